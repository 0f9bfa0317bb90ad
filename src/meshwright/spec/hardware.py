"""Known devices and links, each row with its source, and the ways a job may name a cluster."""

import re
from collections.abc import Callable
from typing import Any

import msgspec

from meshwright.spec.cluster import Cluster, Device, Link
from meshwright.spec.errors import SettingError, closest

Table = dict[str, Any]


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """A device as it is usually bought: with its links inside the node and out of it."""

    device: Device
    intra: Link
    inter: Link


INFINIBAND_NDR = Link(
    name="InfiniBand NDR, one 400 Gb/s port a device",
    bytes_per_s=50e9,
    latency_s=5e-6,
    source="NVIDIA ConnectX-7 datasheet, 2022 (400 Gb/s); latency: order of magnitude of NCCL over InfiniBand, "
    "NCCL tuning table (net latency), NVIDIA/nccl src/graph/tuning.cc",
)
NVLINK_4 = Link(
    name="NVLink 4",
    bytes_per_s=450e9,
    latency_s=6e-6,
    source="NVIDIA H100 datasheet, 2023 (900 GB/s both directions)",
)

NODES: dict[str, Node] = {
    "h100": Node(
        device=Device(
            name="h100",
            kind="cuda",
            memory_bytes=80e9,
            memory_bytes_per_s=3.35e12,
            peak_bf16_flops_per_s=989.4e12,
            peak_fp32_flops_per_s=66.9e12,
            source="NVIDIA H100 Tensor Core GPU datasheet, SXM5, 2023 (dense)",
        ),
        intra=NVLINK_4,
        inter=INFINIBAND_NDR,
    ),
    "h200": Node(
        device=Device(
            name="h200",
            kind="cuda",
            memory_bytes=141e9,
            memory_bytes_per_s=4.8e12,
            peak_bf16_flops_per_s=989.4e12,
            peak_fp32_flops_per_s=66.9e12,
            source="NVIDIA H200 Tensor Core GPU datasheet, SXM, 2024 (dense)",
        ),
        intra=NVLINK_4,
        inter=INFINIBAND_NDR,
    ),
}


def cluster_of(gpus: str) -> Cluster:
    """A cluster from "8xh100" (one node) or "4x8xh100" (nodes x devices per node x device)."""
    match = re.fullmatch(r"(?:(\d+)x)?(\d+)x([a-z0-9-]+)", gpus.lower())
    if not match:
        raise SettingError(f'gpus "{gpus}"', "must look like 8xh100 or 4x8xh100", "8xh100")
    nodes, devices, name = int(match[1] or 1), int(match[2]), match[3]
    if name not in NODES:
        raise SettingError(f'gpus "{gpus}"', f'no device "{name}" in the hardware table', closest(name, NODES))
    row = NODES[name]
    return Cluster(device=row.device, nodes=nodes, devices_per_node=devices, intra=row.intra, inter=row.inter)


def expand_cluster(section: Table, local: Callable[[int], Cluster]) -> Table:
    """Fill a job's [cluster] table.

    Empty, or with `processes` alone: this machine, with that many CPU processes where it has no GPU.
    `gpus = "8xh100"`: from the hardware table. Otherwise the numbers themselves.
    """
    if set(section) <= {"processes"}:
        processes = section.get("processes", 1)
        if not isinstance(processes, int) or processes < 1:
            raise SettingError(f"cluster.processes = {processes}", "must be a whole number, at least 1", "4")
        return msgspec.to_builtins(local(processes))
    if "gpus" in section:
        if others := sorted(set(section) - {"gpus"}):
            raise SettingError(f"cluster.{others[0]}", "cannot stand beside cluster.gpus", "one of the two")
        return msgspec.to_builtins(cluster_of(str(section["gpus"])))
    if "processes" in section:
        raise SettingError("cluster.processes", "cannot stand beside a cluster given by numbers", "one of the two")
    return section
