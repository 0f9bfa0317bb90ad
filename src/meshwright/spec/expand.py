"""A job's [cluster] table in words, as the numbers that it stands for."""

import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from math import isfinite
from typing import Any, cast

import msgspec

from meshwright.spec.cluster import Cluster, Link, Nodes, check_link, check_nodes
from meshwright.spec.convert import Table, convert
from meshwright.spec.errors import SettingError, as_toml, nearest_choice
from meshwright.spec.hardware import cluster_of
from meshwright.spec.links import FABRICS, NETWORK_LATENCY_S, NETWORK_LATENCY_SOURCE, NETWORKS, Port, share_ports
from meshwright.spec.numbers import check_range
from meshwright.spec.uneven import check_joined, join_nodes

# What only its owner knows of a cluster.
TOLD = ("price_per_device_hour", "device_hours_per_failure")
# What may stand beside `gpus`: that, and links other than the usual ones.
BESIDE_GPUS = {"intra", "inter", *TOLD}
# Of a port in Gb/s, and of ports in a node: far beyond any that is sold.
MOST_GBIT = 1e6
MOST_PORTS = 2**16


class Ports(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Ports of a node as a job gives them: all its devices share them."""

    gbit_per_s: float
    ports: int
    latency_s: float = NETWORK_LATENCY_S


def is_local(section: Table) -> bool:
    """Whether a job's [cluster] table asks for this machine."""
    return set(section) <= {"processes", *TOLD}


def expand_cluster(section: Table, local: Callable[[int], Cluster]) -> Table:
    """Fill a job's [cluster] table.

    Without more than `processes` and a price: this machine, with that many CPU processes where it has no GPU.
    `gpus = "8xh100"`: from the hardware table. Otherwise the numbers themselves, of nodes that are alike or of several
    `groups`. Links may be words everywhere: `inter = "infiniband-hdr"`.
    """
    if is_local(section):
        found = local(count_processes(section.get("processes", 1)))
        return without_none(msgspec.to_builtins(found)) | pick(section, *TOLD)
    if "processes" in section:
        other = "cluster.gpus" if "gpus" in section else "a cluster given by numbers"
        raise SettingError("cluster.processes", f"cannot stand beside {other}", "one of the two")
    if "gpus" in section:
        if others := sorted(set(section) - {"gpus"} - BESIDE_GPUS):
            raise SettingError(f"cluster.{others[0]}", "cannot stand beside cluster.gpus", "one of the two")
        return expand_named(section)
    return expand_numbers(section)


def count_processes(processes: object) -> int:
    """A number of CPU processes; raises SettingError for what is none."""
    if isinstance(processes, bool) or not isinstance(processes, int) or processes < 1:
        reason = "must be a whole number, at least 1"
        number = processes if isinstance(processes, int | float) and not isinstance(processes, bool) else 4
        near = max(1, int(number)) if isfinite(number) else 4
        raise SettingError(f"cluster.processes = {as_toml(processes)}", reason, f"cluster.processes = {near}")
    return processes


def expand_named(section: Table) -> Table:
    """A cluster of known devices, with the links that are given in place of the usual ones."""
    cluster = cluster_of(str(section["gpus"]))
    groups = cluster.groups or (cluster.plain(),)
    check_groups(groups)
    intra, inter = section.get("intra"), section.get("inter")
    if intra is not None:
        link = convert(expand_fabric(intra, "cluster.intra"), Link, "cluster.intra")
        groups = tuple(msgspec.structs.replace(group, intra=link) for group in groups)
    if inter is not None:
        link = convert(expand_network(inter, most_devices(groups), "cluster.inter"), Link, "cluster.inter")
        cluster = msgspec.structs.replace(cluster, inter=link)
    joined = join_nodes(groups, cluster.inter, setting="cluster.gpus")
    return without_none(msgspec.to_builtins(joined)) | pick(section, *TOLD)


def check_groups(groups: tuple[Nodes, ...]) -> None:
    """Raise SettingError for nodes that are none or far too many, before they are counted together."""
    for number, group in enumerate(groups):
        check_nodes(group, f"cluster.groups[{number}]" if len(groups) > 1 else "cluster")


def expand_numbers(section: Table) -> Table:
    """A cluster given by numbers, with its links' words and its groups filled in."""
    filled = dict(section)
    if "intra" in filled:
        filled["intra"] = expand_fabric(filled["intra"], "cluster.intra")
    devices = filled.get("devices_per_node")
    if filled.get("groups"):
        groups = read_groups(filled["groups"])
        devices = most_devices(groups)
    else:
        groups = ()
    if "inter" in filled:
        filled["inter"] = expand_network(filled["inter"], devices, "cluster.inter")
    if not groups:
        return filled
    if measured := [name for name in ("measured", "rates") if filled.get(name) is not None]:
        raise SettingError(f"cluster.{measured[0]}", "are of nodes that are alike", "leave out cluster.groups, or it")
    if "inter" not in filled:
        raise SettingError("cluster.inter", "is missing", f'cluster.inter = "{next(iter(NETWORKS))}"')
    inter = convert(filled["inter"], Link, "cluster.inter")
    check_link(inter, "cluster.inter")
    meant = join_nodes(groups, inter, setting="cluster.groups")
    table = without_none(msgspec.to_builtins(meant)) | pick(filled, *TOLD)
    # A job that was written out has both.
    check_joined(convert(table | filled | pick(table, "groups"), Cluster, "cluster"), meant)
    return table


def read_groups(given: object) -> tuple[Nodes, ...]:
    """The nodes of `[[cluster.groups]]`, checked."""
    if not isinstance(given, list | tuple) or not all(isinstance(one, dict) for one in cast(list[Any], given)):
        raise SettingError("cluster.groups", "must be a list of sections", "[[cluster.groups]] with keys under it")
    groups: list[Nodes] = []
    for number, entry in enumerate(cast(list[Table], given)):
        name = f"cluster.groups[{number}]"
        filled = dict(entry)
        if "intra" in filled:
            filled["intra"] = expand_fabric(filled["intra"], f"{name}.intra")
        if "gpus" in filled:
            if others := sorted(set(filled) - {"gpus", "intra"}):
                raise SettingError(f"{name}.{others[0]}", f"cannot stand beside {name}.gpus", "one of the two")
            cluster = cluster_of(str(filled["gpus"]), setting=f"{name}.gpus")
            if cluster.groups:
                setting = f'{name}.gpus = "{filled["gpus"]}"'
                raise SettingError(setting, "is more than one group", "a [[cluster.groups]] for each")
            filled = msgspec.to_builtins(cluster.plain()) | pick(filled, "intra")
        group = convert(filled, Nodes, name)
        check_nodes(group, name)
        groups.append(group)
    return tuple(groups)


def most_devices(groups: tuple[Nodes, ...]) -> int:
    """Of the largest node, whose devices have least of a port that they share."""
    return max(group.devices_per_node for group in groups)


def expand_fabric(given: Any, setting: str) -> Any:
    """A link inside a node from its word; numbers as they are."""
    if not isinstance(given, str):
        table = cast(Table, given) if isinstance(given, dict) else {}
        if ports := sorted({"gbit_per_s", "ports"} & set(table)):
            raise SettingError(f"{setting}.{ports[0]}", "is of a network between nodes", f"{setting}.bytes_per_s")
        return cast(Any, given)
    if given.lower() not in FABRICS:
        reason = "no such link inside a node"
        if given.lower() in NETWORKS:
            reason = "joins nodes, not the devices inside one"
        raise SettingError(f"{setting} = {as_toml(given)}", reason, nearest_word(setting, given, FABRICS))
    return msgspec.to_builtins(FABRICS[given.lower()])


def expand_network(given: Any, devices: object, setting: str) -> Any:
    """The network between nodes of `devices` from its word, "4xinfiniband-hdr" or "roce-200", or from its ports.

    A link's own numbers are left as they are.
    """
    if isinstance(given, str):
        match = re.fullmatch(r"(?:(\d{1,9})x)?(.*)", given.strip().lower(), re.ASCII | re.DOTALL)
        assert match
        if match[2] not in NETWORKS:
            reason = "no such network"
            if match[2] in FABRICS:
                reason = "joins devices inside a node, not nodes"
            raise SettingError(f"{setting} = {as_toml(given)}", reason, nearest_word(setting, match[2], NETWORKS))
        ports = int(match[1]) if match[1] else 0
        if match[1]:
            check_range(f"{setting}: ports", ports, 1, MOST_PORTS)
        return msgspec.to_builtins(share_ports(NETWORKS[match[2]], check_devices_per_node(devices), ports))
    table = cast(Table, given) if isinstance(given, dict) else {}
    if not {"gbit_per_s", "ports"} & set(table):
        return cast(Any, given)
    if mixed := sorted(set(table) & {"bytes_per_s", "name", "source"}):
        raise SettingError(f"{setting}.{mixed[0]}", "cannot stand beside gbit_per_s and ports", "one of the two")
    ports = convert(table, Ports, setting)
    check_range(f"{setting}.gbit_per_s", ports.gbit_per_s, 1e-3, MOST_GBIT)
    check_range(f"{setting}.ports", ports.ports, 1, MOST_PORTS)
    check_range(f"{setting}.latency_s", ports.latency_s, 0.0, 1e3)
    source = "the job's own" + ("" if "latency_s" in table else f"; {NETWORK_LATENCY_SOURCE}, InfiniBand's: assumed")
    port = Port(
        name=f"ports of {ports.gbit_per_s:g} Gb/s",
        gbit_per_s=ports.gbit_per_s,
        latency_s=ports.latency_s,
        source=source,
    )
    return msgspec.to_builtins(share_ports(port, check_devices_per_node(devices), ports.ports))


def nearest_word(setting: str, word: str, known: Iterable[str]) -> str:
    """The one word that is nearest in spelling, as a setting; several where none is near."""
    near = get_close_matches(word, list(known), n=1)
    return nearest_choice(setting, near[0] if near else word, known)


def check_devices_per_node(devices: object) -> int:
    """How many share a node's ports; raises SettingError where the job does not say it in a number."""
    if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1:
        shown = "" if devices is None else f" = {as_toml(devices)}"
        reason = "is missing" if devices is None else "must be a whole number, at least 1"
        raise SettingError(f"cluster.devices_per_node{shown}", reason, "cluster.devices_per_node = 8")
    return devices


def pick(table: Table, *names: str) -> Table:
    """Of a table, these keys where it has them."""
    return {name: table[name] for name in names if name in table}


def without_none(table: Table) -> Table:
    """A table without the keys that stand for nothing, for which TOML has no word."""
    kept = {key: value for key, value in table.items() if value is not None}
    return {key: without_none(cast(Table, value)) if isinstance(value, dict) else value for key, value in kept.items()}
