"""Known devices and links, each row with its source, and the ways a job may name a cluster."""

import re
from collections.abc import Callable
from math import isfinite
from typing import Any

import msgspec

from meshwright.spec.cluster import Cluster, Device, Link
from meshwright.spec.errors import SettingError, as_toml, closest

Table = dict[str, Any]


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """A device as it is usually bought: with its links inside the node and out of it."""

    device: Device
    intra: Link
    inter: Link


# Latency of one ring step: (all-reduce of 1 MiB on 4 H200s took 44 us, 4.5 us of it transfer) / 6 steps; notes on
# GPU baselines, 2026-11-22. Across nodes: base latency of NCCL's ring over the network, NVIDIA/nccl
# src/graph/tuning.cc (hardware latency 14 us for the simple protocol).
NVLINK_LATENCY_S = 6e-6
NETWORK_LATENCY_S = 14e-6
LATENCY_SOURCE = "latency measured on H200s, 2026-11-22"
NETWORK_LATENCY_SOURCE = "latency NVIDIA/nccl src/graph/tuning.cc"

INFINIBAND_NDR = Link(
    name="InfiniBand NDR, one 400 Gb/s port a device",
    bytes_per_s=50e9,
    latency_s=NETWORK_LATENCY_S,
    source=f"NVIDIA ConnectX-7 datasheet, 2022; {NETWORK_LATENCY_SOURCE}",
)
INFINIBAND_HDR = Link(
    name="InfiniBand HDR, one 200 Gb/s port a device",
    bytes_per_s=25e9,
    latency_s=NETWORK_LATENCY_S,
    source=f"NVIDIA DGX A100 datasheet, 2021 (8 ConnectX-6 200 Gb/s); {NETWORK_LATENCY_SOURCE}",
)
ETHERNET_100 = Link(
    name="Ethernet, 100 Gb/s shared by 8 devices",
    bytes_per_s=12.5e9 / 8,
    latency_s=50e-6,
    source="a usual server with PCIe cards; give [cluster.inter] where yours differs",
)
NVLINK_5 = Link(
    name="NVLink 5",
    bytes_per_s=900e9,
    latency_s=NVLINK_LATENCY_S,
    source=f"NVIDIA DGX B200 datasheet, 2024 (1.8 TB/s both directions); {LATENCY_SOURCE}",
)
NVLINK_4 = Link(
    name="NVLink 4",
    bytes_per_s=450e9,
    latency_s=NVLINK_LATENCY_S,
    source=f"NVIDIA H100 datasheet, 2023 (900 GB/s both directions); {LATENCY_SOURCE}",
)
NVLINK_3 = Link(
    name="NVLink 3",
    bytes_per_s=300e9,
    latency_s=NVLINK_LATENCY_S,
    source=f"NVIDIA A100 datasheet, 2021 (600 GB/s both directions); {LATENCY_SOURCE}",
)
PCIE_5 = Link(
    name="PCIe 5.0 x16",
    bytes_per_s=63e9,
    latency_s=10e-6,
    source="NVIDIA H100 PCIe product brief, 2022 (128 GB/s both directions); latency: assumed, above NVLink's",
)
PCIE_4 = Link(
    name="PCIe 4.0 x16",
    bytes_per_s=31.5e9,
    latency_s=10e-6,
    source="PCI Express 4.0 (64 GB/s both directions before coding); latency: assumed, above NVLink's",
)


def _gpu(name: str, memory_bytes: float, memory_bytes_per_s: float, bf16: float, fp32: float, source: str) -> Device:
    """A GPU's row: dense peaks, in TFLOP/s as datasheets print them."""
    return Device(
        name=name,
        kind="cuda",
        memory_bytes=memory_bytes,
        memory_bytes_per_s=memory_bytes_per_s,
        peak_bf16_flops_per_s=bf16 * 1e12,
        peak_fp32_flops_per_s=fp32 * 1e12,
        source=source,
    )


# Peaks are dense. fp32 is the rate outside the tensor cores: PyTorch keeps TF32 off by default.
NODES: dict[str, Node] = {
    "a100-40": Node(
        device=_gpu("a100-40", 40e9, 1.555e12, 312, 19.5, "NVIDIA A100 datasheet, SXM4 40GB, 2020"),
        intra=NVLINK_3,
        inter=INFINIBAND_HDR,
    ),
    "a100-80": Node(
        device=_gpu("a100-80", 80e9, 2.039e12, 312, 19.5, "NVIDIA A100 datasheet, SXM4 80GB, 2021"),
        intra=NVLINK_3,
        inter=INFINIBAND_HDR,
    ),
    "h100": Node(
        device=_gpu("h100", 80e9, 3.35e12, 989.4, 66.9, "NVIDIA H100 Tensor Core GPU datasheet, SXM5, 2023"),
        intra=NVLINK_4,
        inter=INFINIBAND_NDR,
    ),
    "h100-pcie": Node(
        device=_gpu("h100-pcie", 80e9, 2.0e12, 756, 51.2, "NVIDIA H100 Tensor Core GPU datasheet, PCIe, 2022"),
        intra=PCIE_5,
        inter=INFINIBAND_NDR,
    ),
    "h200": Node(
        device=_gpu("h200", 141e9, 4.8e12, 989.4, 66.9, "NVIDIA H200 Tensor Core GPU datasheet, SXM, 2024"),
        intra=NVLINK_4,
        inter=INFINIBAND_NDR,
    ),
    "b200": Node(
        device=_gpu(
            "b200",
            180e9,
            8.0e12,
            2250,
            80,
            "NVIDIA DGX B200 datasheet (1,440 GB and 64 TB/s over 8) and Blackwell "
            "architecture brief (HGX, 1,000 W), 2024",
        ),
        intra=NVLINK_5,
        inter=INFINIBAND_NDR,
    ),
    "gb200": Node(
        device=_gpu("gb200", 186e9, 8.0e12, 2500, 80, "NVIDIA GB200 NVL72 datasheet, 2024"),
        intra=NVLINK_5,
        inter=INFINIBAND_NDR,
    ),
    "l40s": Node(
        device=_gpu("l40s", 48e9, 0.864e12, 362.05, 91.6, "NVIDIA L40S datasheet, 2023"),
        intra=PCIE_4,
        inter=ETHERNET_100,
    ),
    "rtx4090": Node(
        device=_gpu(
            "rtx4090",
            24e9,
            1.008e12,
            165.2,
            82.6,
            "NVIDIA Ada GPU architecture whitepaper, 2022 (bf16 with fp32 accumulation)",
        ),
        intra=PCIE_4,
        inter=ETHERNET_100,
    ),
}

# Words of the name that nvidia-smi prints, all of which must be there -> row. The first that matches counts.
GPU_WORDS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("h100", "pcie"), "h100-pcie"),
    (("h100", "hbm3"), "h100"),
    (("h200", "nvl"), ""),
    (("h100", "nvl"), ""),
    (("h200",), "h200"),
    (("b200",), "b200"),
    (("a100", "sxm4", "80gb"), "a100-80"),
    (("a100", "sxm4", "40gb"), "a100-40"),
    (("l40s",), "l40s"),
    (("rtx", "4090", "laptop"), ""),
    (("rtx", "4090"), "rtx4090"),
)


def match_gpu(name: str) -> Node | None:
    """The row of a GPU as nvidia-smi names it ("NVIDIA H100 80GB HBM3"); None for one that is not in the table."""
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    row = next((row for wanted, row in GPU_WORDS if words.issuperset(wanted)), "")
    return NODES.get(row)


def unknown_gpu(name: str, memory_bytes: float) -> Node:
    """A GPU outside the table: its memory as the driver reports it, its peaks unknown, links as of a PCIe card."""
    source = "not in the hardware table, so peaks are unknown"
    return Node(device=_gpu(name, memory_bytes, 0, 0, 0, source), intra=PCIE_4, inter=ETHERNET_100)


def cluster_of(gpus: str) -> Cluster:
    """A cluster from "8xh100" (one node) or "4x8xh100" (nodes x devices per node x device)."""
    match = re.fullmatch(r"(?:(\d+)x)?(\d+)x([a-z0-9-]+)", gpus.lower())
    if not match:
        raise SettingError(f'gpus "{gpus}"', "must look like 8xh100 or 4x8xh100", "8xh100")
    nodes, devices, name = int(match[1] or 1), int(match[2]), match[3]
    if nodes < 1 or devices < 1:
        raise SettingError(f'gpus "{gpus}"', "holds no device", f"1x{name}")
    if name not in NODES:
        raise SettingError(f'gpus "{gpus}"', f'no device "{name}" in the hardware table', closest(name, NODES))
    row = NODES[name]
    return Cluster(device=row.device, nodes=nodes, devices_per_node=devices, intra=row.intra, inter=row.inter)


def is_local(section: Table) -> bool:
    """Whether a job's [cluster] table asks for this machine."""
    return set(section) <= {"processes"}


def expand_cluster(section: Table, local: Callable[[int], Cluster]) -> Table:
    """Fill a job's [cluster] table.

    Empty, or with `processes` alone: this machine, with that many CPU processes where it has no GPU.
    `gpus = "8xh100"`: from the hardware table. Otherwise the numbers themselves.
    """
    if is_local(section):
        processes = section.get("processes", 1)
        if isinstance(processes, bool) or not isinstance(processes, int) or processes < 1:
            reason = "must be a whole number, at least 1"
            number = processes if isinstance(processes, int | float) and not isinstance(processes, bool) else 4
            near = max(1, int(number)) if isfinite(number) else 4
            raise SettingError(f"cluster.processes = {as_toml(processes)}", reason, f"cluster.processes = {near}")
        return msgspec.to_builtins(local(processes))
    if "gpus" in section:
        if others := sorted(set(section) - {"gpus"}):
            raise SettingError(f"cluster.{others[0]}", "cannot stand beside cluster.gpus", "one of the two")
        return msgspec.to_builtins(cluster_of(str(section["gpus"])))
    if "processes" in section:
        raise SettingError("cluster.processes", "cannot stand beside a cluster given by numbers", "one of the two")
    return section
