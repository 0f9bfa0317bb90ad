"""Nodes that are not alike, as the even cluster that a layout can be placed on."""

from collections.abc import Sequence
from math import gcd

import msgspec

from meshwright.spec.cluster import Cluster, Device, Link, Nodes
from meshwright.spec.errors import SettingError


def join_nodes(groups: Sequence[Nodes], inter: Link, *, setting: str) -> Cluster:
    """A cluster of these nodes. Alike, they are one group; else the even cluster that every layout can count on.

    Ranks of a layout have equal work and wait for each other, so each is as fast as the slowest device and has as much
    memory as the smallest. Nodes are cut to the largest size that divides all of them: no group of ranks that such a
    piece holds crosses a border, and pieces of one node count as if the network joined them.

    Raises SettingError, of `setting`, for devices of different kinds.
    """
    groups = merge(groups)
    kinds = sorted({group.device.kind for group in groups})
    if len(kinds) > 1:
        raise SettingError(setting, f"{' and '.join(kinds)} devices cannot train one model together", "one kind alone")
    if len(groups) == 1:
        only = groups[0]
        return Cluster(
            device=only.device,
            nodes=only.nodes,
            devices_per_node=only.devices_per_node,
            intra=only.intra,
            inter=inter,
        )
    piece = gcd(*(group.devices_per_node for group in groups))
    return Cluster(
        device=slowest_device([group.device for group in groups]),
        nodes=sum(group.nodes * group.devices_per_node // piece for group in groups),
        devices_per_node=piece,
        intra=slower_link([group.intra for group in groups]),
        inter=inter,
        groups=tuple(groups),
    )


def merge(groups: Sequence[Nodes]) -> list[Nodes]:
    """The groups with those that are alike counted together, in the order in which they first come."""
    merged: list[Nodes] = []
    for group in groups:
        alike = [n for n, other in enumerate(merged) if msgspec.structs.replace(other, nodes=group.nodes) == group]
        if alike:
            before = merged[alike[0]]
            merged[alike[0]] = msgspec.structs.replace(before, nodes=before.nodes + group.nodes)
        else:
            merged.append(group)
    return merged


def slowest_device(devices: Sequence[Device]) -> Device:
    """The least of each figure; the slowest's name comes first. What one of them has not, all have not."""
    if all(device == devices[0] for device in devices):
        return devices[0]
    ordered = sorted(devices, key=lambda device: device.peak_flops_per_s("bf16"))
    return Device(
        name=" + ".join(dict.fromkeys(device.name for device in ordered)),
        kind=ordered[0].kind,
        memory_bytes=min(device.memory_bytes for device in devices),
        memory_bytes_per_s=min(device.memory_bytes_per_s for device in devices),
        # Where one has bf16 and another fp16 alone, they share neither, and 16 bits are as fast as the slower's.
        peak_bf16_flops_per_s=min(device.peak_bf16_flops_per_s for device in devices),
        peak_fp32_flops_per_s=min(device.peak_fp32_flops_per_s for device in devices),
        peak_fp16_flops_per_s=min(device.peak_flops_per_s("bf16") for device in devices)
        if any(device.peak_fp16_flops_per_s and not device.peak_bf16_flops_per_s for device in devices)
        else 0.0,
        peak_fp8_flops_per_s=min(device.peak_fp8_flops_per_s for device in devices),
        peak_fp4_flops_per_s=min(device.peak_fp4_flops_per_s for device in devices),
        source="the least of each figure of: " + "; ".join(dict.fromkeys(device.source for device in ordered)),
    )


def slower_link(links: Sequence[Link]) -> Link:
    """The link with the least bandwidth, with the longest latency of all."""
    slowest = min(links, key=lambda link: link.bytes_per_s)
    return msgspec.structs.replace(slowest, latency_s=max(link.latency_s for link in links))


def check_joined(given: Cluster, meant: Cluster) -> None:
    """Raise SettingError where what is given beside `cluster.groups` is not the even cluster that they come to."""
    for name in ("nodes", "devices_per_node", "device", "intra"):
        if (value := getattr(given, name)) != getattr(meant, name):
            shown = f" = {value}" if isinstance(value, int) else ""
            raise SettingError(f"cluster.{name}{shown}", "is not what cluster.groups come to", "leave it out")
