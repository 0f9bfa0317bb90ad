"""Known links, each row with its source: what joins devices inside a node, and the networks that join nodes."""

import msgspec

from meshwright.spec.cluster import Link

# Latency of one ring step: (all-reduce of 1 MiB on 4 H200s took 44 us, 4.5 us of it transfer) / 6 steps; notes on
# GPU baselines, 2026-11-22. Across nodes: base latency of NCCL's ring over the network, NVIDIA/nccl
# src/graph/tuning.cc (hardware latency 14 us for the simple protocol).
NVLINK_LATENCY_S = 6e-6
NETWORK_LATENCY_S = 14e-6
LATENCY_SOURCE = "latency measured on H200s, 2026-11-22"
NETWORK_LATENCY_SOURCE = "latency NVIDIA/nccl src/graph/tuning.cc"
# Not measured here: a little above NVLink's, because PCIe's round trips go through the host's switches.
PCIE_LATENCY_S = 10e-6
# Through the kernel's TCP, as Ethernet without RDMA is used: assumed.
ETHERNET_LATENCY_S = 50e-6
# "Around 1 us a hop" in the chapter on TPUs of "How to Scale Your Model" (jax-ml.github.io/scaling-book, 2025).
ICI_LATENCY_S = 1e-6


class Port(msgspec.Struct, frozen=True, kw_only=True):
    """One port of a network between nodes.

    gbit_per_s: what it sends, and at the same time receives. node: how many a node has as it is usually bought; 0: one
    for each of its devices.
    """

    name: str
    gbit_per_s: float
    latency_s: float
    source: str
    node: int = 0


def share_ports(port: Port, devices: int, ports: int = 0) -> Link:
    """What each of a node's `devices` has of its `ports`, all of them sending at once; 0: of as many as usual."""
    ports = ports or port.node or devices
    each = ports == devices
    shared = "one port a device" if each else f"{ports} port{'s' * (ports > 1)} a node of {devices}"
    return Link(
        name=f"{port.name}, {shared}",
        bytes_per_s=port.gbit_per_s * 1e9 / 8 * (1 if each else ports / devices),
        latency_s=port.latency_s,
        source=port.source,
    )


def _nvlink(name: str, gigabytes_per_s: float, source: str) -> Link:
    return Link(
        name=name,
        bytes_per_s=gigabytes_per_s * 1e9,
        latency_s=NVLINK_LATENCY_S,
        source=f"{source}; {LATENCY_SOURCE}",
    )


def _pcie(name: str, gigabytes_per_s: float, source: str) -> Link:
    return Link(
        name=name,
        bytes_per_s=gigabytes_per_s * 1e9,
        latency_s=PCIE_LATENCY_S,
        source=f"{source}; latency: assumed, above NVLink's",
    )


def _fabric(name: str, gigabytes_per_s: float, source: str) -> Link:
    return Link(
        name=name,
        bytes_per_s=gigabytes_per_s * 1e9,
        latency_s=NVLINK_LATENCY_S,
        source=f"{source}; latency: assumed, NVLink's",
    )


def _ici(name: str, gigabytes_per_s: float, source: str) -> Link:
    return Link(
        name=name,
        bytes_per_s=gigabytes_per_s * 1e9,
        latency_s=ICI_LATENCY_S,
        source=f"{source}: a ring along one axis of the torus, two of its ports",
    )


# One direction. Where a switch or a mesh joins all devices of a node, a ring among them has each device's whole rate.
FABRICS: dict[str, Link] = {
    "nvlink-2": _nvlink("NVLink 2", 150, "NVIDIA V100 datasheet, 2018 (300 GB/s both directions)"),
    "nvlink-3": _nvlink("NVLink 3", 300, "NVIDIA A100 datasheet, 2021 (600 GB/s both directions)"),
    "nvlink-4": _nvlink("NVLink 4", 450, "NVIDIA H100 datasheet, 2023 (900 GB/s both directions)"),
    "nvlink-5": _nvlink("NVLink 5", 900, "NVIDIA DGX B200 datasheet, 2024 (1.8 TB/s both directions)"),
    "nvlink-bridge": _nvlink(
        "NVLink bridge between two cards",
        300,
        "NVIDIA A100 80GB PCIe and H100 NVL product briefs, 2021 and 2024 (600 GB/s both directions)",
    ),
    "pcie-3": _pcie("PCIe 3.0 x16", 15.75, "PCI Express 3.0 (8 GT/s a lane, 128b/130b)"),
    "pcie-4": _pcie("PCIe 4.0 x16", 31.5, "PCI Express 4.0 (64 GB/s both directions before coding)"),
    "pcie-5": _pcie("PCIe 5.0 x16", 63, "NVIDIA H100 PCIe product brief, 2022 (128 GB/s both directions)"),
    "infinity-fabric-3": _fabric(
        "Infinity Fabric of MI300X", 448, "AMD Instinct MI300X datasheet, 2023 (7 links of 128 GB/s both directions)"
    ),
    "infinity-fabric-4": _fabric(
        "Infinity Fabric of MI350", 537.6, "AMD Instinct MI355X datasheet, 2025 (7 links of 153.6 GB/s both directions)"
    ),
    "ici-v5e": _ici("ICI of TPU v5e", 100, "Google Cloud TPU v5e documentation, 2025 (4 ports, 400 GB/s both ways)"),
    "ici-v5p": _ici("ICI of TPU v5p", 200, "Google Cloud TPU v5p documentation, 2025 (6 ports, 1,200 GB/s both ways)"),
    "ici-v6e": _ici("ICI of TPU v6e", 200, "Google Cloud TPU v6e documentation, 2025 (4 ports, 800 GB/s both ways)"),
}


def _infiniband(generation: str, gbit_per_s: float, source: str) -> Port:
    return Port(
        name=f"InfiniBand {generation}",
        gbit_per_s=gbit_per_s,
        latency_s=NETWORK_LATENCY_S,
        source=f"{source}; {NETWORK_LATENCY_SOURCE}",
    )


def _roce(gbit_per_s: float) -> Port:
    return Port(
        name=f"RoCE {gbit_per_s:g} Gb/s",
        gbit_per_s=gbit_per_s,
        latency_s=NETWORK_LATENCY_S,
        source=f"the port's rate; {NETWORK_LATENCY_SOURCE}, InfiniBand's: assumed",
    )


def _ethernet(gbit_per_s: float) -> Port:
    return Port(
        name=f"Ethernet {gbit_per_s:g} Gb/s",
        gbit_per_s=gbit_per_s,
        latency_s=ETHERNET_LATENCY_S,
        source="the port's rate; latency: assumed, TCP through the kernel",
        node=1,
    )


def _datacentre(generation: str, gbit_per_s: float, source: str) -> Port:
    return Port(
        name=f"data-centre network of TPU {generation}",
        gbit_per_s=gbit_per_s,
        latency_s=ETHERNET_LATENCY_S,
        source=f"Google Cloud TPU {generation} documentation, 2025 ({source}); latency: assumed, as Ethernet's",
    )


NETWORKS: dict[str, Port] = {
    "infiniband-edr": _infiniband("EDR", 100, "NVIDIA ConnectX-5 product brief, 2017"),
    "infiniband-hdr": _infiniband("HDR", 200, "NVIDIA DGX A100 datasheet, 2021 (8 ConnectX-6 200 Gb/s)"),
    "infiniband-ndr": _infiniband("NDR", 400, "NVIDIA ConnectX-7 datasheet, 2022"),
    "infiniband-xdr": _infiniband("XDR", 800, "NVIDIA ConnectX-8 SuperNIC datasheet, 2024"),
    "roce-100": _roce(100),
    "roce-200": _roce(200),
    "roce-400": _roce(400),
    "ethernet-10": _ethernet(10),
    "ethernet-25": _ethernet(25),
    "ethernet-100": _ethernet(100),
    "ethernet-200": _ethernet(200),
    "ethernet-400": _ethernet(400),
    "dcn-v5e": _datacentre("v5e", 25, "6.4 Tb/s a pod of 256"),
    "dcn-v5p": _datacentre("v5p", 50, "50 Gb/s a chip"),
    "dcn-v6e": _datacentre("v6e", 100, "25.6 Tb/s a pod of 256"),
}
