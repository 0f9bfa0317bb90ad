"""The names that jobs, drivers and libraries give to known devices, and clusters of them."""

import re

from meshwright.spec.cluster import Cluster, Device, Link, Nodes
from meshwright.spec.devices import NODES, Node
from meshwright.spec.errors import SettingError, closest
from meshwright.spec.links import FABRICS, NETWORKS, share_ports
from meshwright.spec.uneven import join_nodes

# Words of the name that nvidia-smi, PyTorch or JAX print, all of which must be there -> row. The first that matches
# counts.
GPU_WORDS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("v100", "sxm2", "16gb"), "v100-16"),
    (("v100", "sxm2", "32gb"), "v100-32"),
    (("v100", "pcie", "16gb"), "v100-pcie-16"),
    (("v100", "pcie", "32gb"), "v100-pcie-32"),
    (("a100", "sxm4", "80gb"), "a100-80"),
    (("a100", "sxm4", "40gb"), "a100-40"),
    (("a100", "80gb", "pcie"), "a100-80-pcie"),
    (("h100", "pcie"), "h100-pcie"),
    (("h100", "nvl"), "h100-nvl"),
    (("h100", "96gb", "hbm2e"), "h100-96"),
    (("h100", "80gb", "hbm3"), "h100"),
    (("h200", "nvl"), "h200-nvl"),
    (("h200",), "h200"),
    (("gb200",), "gb200"),
    (("b200",), "b200"),
    (("gb300",), "gb300"),
    (("b300",), "b300"),
    (("l40s",), "l40s"),
    (("rtx", "4090", "laptop"), ""),
    (("rtx", "4090", "d"), ""),
    (("rtx", "4090"), "rtx4090"),
    (("mi300x",), "mi300x"),
    (("mi325x",), "mi325x"),
    (("mi355x",), "mi355x"),
    (("tpu", "v5", "lite"), "tpu-v5e"),
    (("tpu", "v5p"), "tpu-v5p"),
    (("tpu", "v6", "lite"), "tpu-v6e"),
)


def match_gpu(name: str) -> Node | None:
    """The row of a device as its driver names it ("NVIDIA H100 80GB HBM3"); None for one that is not in the table."""
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    row = next((row for wanted, row in GPU_WORDS if words.issuperset(wanted)), "")
    return NODES.get(row)


def unknown_gpu(name: str, memory_bytes: float) -> Node:
    """A GPU outside the table: its memory as the driver reports it, its peaks unknown, links as of a PCIe card."""
    device = Device(
        name=name,
        kind="cuda",
        memory_bytes=memory_bytes,
        memory_bytes_per_s=0,
        peak_bf16_flops_per_s=0,
        peak_fp32_flops_per_s=0,
        source="not in the hardware table, so peaks are unknown",
    )
    return Node(device=device, intra=FABRICS["pcie-4"], inter=NETWORKS["ethernet-100"])


def cluster_of(gpus: str, *, setting: str = "gpus") -> Cluster:
    """A cluster from "8xh100" (one node), "4x8xh100" (nodes x devices per node x device), or "3x8xh100 + 4xh100".

    Nodes of several kinds are joined by the slowest of their usual networks. setting: what errors call it.
    """
    named = f'{setting} "{gpus}"'
    groups, links = zip(*(parse_nodes(part.strip(), named) for part in gpus.split("+")), strict=True)
    inter = min(links, key=lambda link: link.bytes_per_s)
    return join_nodes(groups, inter, setting=named)


def parse_nodes(word: str, named: str) -> tuple[Nodes, Link]:
    """The nodes that a word like "4x8xh100" stands for, and what each of their devices has of the network."""
    match = re.fullmatch(r"(?:(\d{1,9})x)?(\d{1,9})x([a-z][a-z0-9-]*)", word.lower(), re.ASCII)
    if not match:
        raise SettingError(named, "must look like 8xh100, 4x8xh100 or 3x8xh100 + 4xh100", "8xh100")
    nodes, devices, name = int(match[1] or 1), int(match[2]), match[3]
    if nodes < 1 or devices < 1:
        raise SettingError(named, "holds no device", f"1x{name}")
    if name not in NODES:
        raise SettingError(named, f'no device "{name}" in the hardware table', closest_device(name))
    row = NODES[name]
    group = Nodes(device=row.device, nodes=nodes, devices_per_node=devices, intra=row.intra)
    return group, share_ports(row.inter, devices)


def closest_device(name: str) -> str:
    """The devices of that name with something after it, as "a100" is cut short of "a100-80"; else the nearest one."""
    return " or ".join(known for known in NODES if known.startswith(f"{name}-")) or closest(name, NODES)
