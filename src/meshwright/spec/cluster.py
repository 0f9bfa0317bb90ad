"""Devices, nodes and links: what a layout is placed on. The rows of known hardware are in spec/hardware.py."""

from typing import Literal

import msgspec

from meshwright.spec.errors import SettingError
from meshwright.spec.layout import Precision
from meshwright.spec.numbers import check_range
from meshwright.spec.rates import Measured, Rates, check_rates

# Of each size. Far beyond any cluster, and a search over divisors still ends in a moment.
MOST_DEVICES = 2**20
# Of bytes and of rates a second; it keeps what is divided by them finite.
MOST = 1e21


class Device(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One accelerator, or one CPU process's share of its machine. Peak rates are dense (no sparsity).

    A peak of 0 means "not known": utilisation is then not reported.
    """

    name: str
    kind: Literal["cuda", "cpu"]
    memory_bytes: float
    memory_bytes_per_s: float
    peak_bf16_flops_per_s: float
    peak_fp32_flops_per_s: float
    source: str

    def peak_flops_per_s(self, precision: Precision) -> float:
        """Datasheet peak of matrix products in `precision`."""
        return self.peak_bf16_flops_per_s if precision == "bf16" else self.peak_fp32_flops_per_s


class Link(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one device can send (and at the same time receive) over a kind of link."""

    name: str
    bytes_per_s: float
    latency_s: float
    source: str


class Cluster(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`nodes` x `devices_per_node` equal devices; `intra` links them inside a node, `inter` between nodes.

    rates: what `meshwright calibrate` measured of it; None for the built-in ones of its device. measured: when.
    """

    device: Device
    nodes: int = 1
    devices_per_node: int
    intra: Link
    inter: Link
    rates: Rates | None = None
    measured: Measured | None = None

    @property
    def devices(self) -> int:
        """Number of devices in all."""
        return self.nodes * self.devices_per_node

    def label(self) -> str:
        """The cluster in a few words: "2 nodes of 8 x h100"."""
        node = f"{self.devices_per_node} x {self.device.name}"
        return node if self.nodes == 1 else f"{self.nodes} nodes of {node}"


def check_cluster(cluster: Cluster, world_size: int) -> None:
    """Raise SettingError where the cluster is empty, has impossible rates or is smaller than the layout."""
    device = cluster.device
    for setting, value, low, high in (
        ("nodes", cluster.nodes, 1, MOST_DEVICES),
        ("devices_per_node", cluster.devices_per_node, 1, MOST_DEVICES),
        ("device.memory_bytes", device.memory_bytes, 1.0, MOST),
        ("device.memory_bytes_per_s", device.memory_bytes_per_s, 1.0, MOST),
        ("device.peak_bf16_flops_per_s", device.peak_bf16_flops_per_s, 0.0, MOST),
        ("device.peak_fp32_flops_per_s", device.peak_fp32_flops_per_s, 0.0, MOST),
        ("intra.bytes_per_s", cluster.intra.bytes_per_s, 1.0, MOST),
        ("intra.latency_s", cluster.intra.latency_s, 0.0, 1e3),
        ("inter.bytes_per_s", cluster.inter.bytes_per_s, 1.0, MOST),
        ("inter.latency_s", cluster.inter.latency_s, 0.0, 1e3),
    ):
        check_range(f"cluster.{setting}", value, low, high)
    if cluster.rates is not None:
        check_rates(cluster.rates)
    if world_size > cluster.devices:
        raise SettingError(
            f"layout of {world_size} ranks",
            f"more ranks than devices: the cluster has {cluster.label()}",
            f"sizes that multiply to {cluster.devices}",
        )
