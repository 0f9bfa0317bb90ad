"""Devices, nodes and links: what a layout is placed on. The rows of known hardware are in spec/devices.py."""

from typing import Literal

import msgspec

from meshwright.spec.errors import SettingError, in_words
from meshwright.spec.layout import Precision
from meshwright.spec.numbers import check_range

# In all. Far beyond any cluster, and a search over divisors still ends in a moment.
MOST_DEVICES = 2**20
# Of bytes and of rates a second; it keeps what is divided by them finite.
MOST = 1e21
# Of an hour of a device, in any currency; and what is multiplied by it stays finite.
MOST_PRICE = 1e9


DeviceKind = Literal["cuda", "rocm", "tpu", "cpu"]


class Device(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One accelerator, or one CPU process's share of its machine. Peak rates are dense (no sparsity).

    A peak of 0 means "not known": utilisation is then not reported. Of fp16, fp8 and fp4 it means that the device has
    none; fp16 is given where bf16 is missing. No plan uses fp4 yet.
    """

    name: str
    kind: DeviceKind
    memory_bytes: float
    memory_bytes_per_s: float
    peak_bf16_flops_per_s: float
    peak_fp32_flops_per_s: float
    peak_fp16_flops_per_s: float = 0.0
    peak_fp8_flops_per_s: float = 0.0
    peak_fp4_flops_per_s: float = 0.0
    source: str

    @property
    def is_gpu(self) -> bool:
        """Whether it is what PyTorch calls a GPU, of NVIDIA or AMD."""
        return self.kind in ("cuda", "rocm")

    @property
    def is_accelerator(self) -> bool:
        """Whether blocks run compiled on it, beside a host that runs ahead: everything but a CPU."""
        return self.kind != "cpu"

    def peak_flops_per_s(self, precision: Precision) -> float:
        """Datasheet peak of matrix products in `precision`; of bf16 on a device without it, that of fp16."""
        match precision:
            case "fp32":
                return self.peak_fp32_flops_per_s
            case "fp8":
                return self.peak_fp8_flops_per_s
            case "bf16":
                return self.peak_bf16_flops_per_s or self.peak_fp16_flops_per_s


class Link(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one device can send (and at the same time receive) over a kind of link."""

    name: str
    bytes_per_s: float
    latency_s: float
    source: str


class Nodes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Nodes that are alike, in a cluster in which not all are."""

    device: Device
    nodes: int = 1
    devices_per_node: int
    intra: Link

    def label(self) -> str:
        """In a few words: "2 nodes of 8 x h100"."""
        node = f"{self.devices_per_node} x {self.device.name}"
        return node if self.nodes == 1 else f"{self.nodes} nodes of {node}"


class Cluster(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`nodes` x `devices_per_node` equal devices; `intra` links them inside a node, `inter` between nodes.

    groups: what the nodes really are where they are not alike; the other fields then describe the even cluster that
    they can be planned as (spec/uneven.py). None where nobody said: price_per_device_hour, what an hour of one device
    costs, in any currency; device_hours_per_failure, of one device between what interrupts training.
    """

    device: Device
    nodes: int = 1
    devices_per_node: int
    intra: Link
    inter: Link
    groups: tuple[Nodes, ...] = ()
    price_per_device_hour: float | None = None
    device_hours_per_failure: float | None = None

    @property
    def devices(self) -> int:
        """Number of devices in all."""
        return self.nodes * self.devices_per_node

    def label(self) -> str:
        """The cluster in a few words: "2 nodes of 8 x h100"."""
        if not self.groups:
            return self.plain().label()
        return in_words([f"{'1 node of ' * (group.nodes == 1)}{group.label()}" for group in self.groups], "and")

    def plain(self) -> Nodes:
        """Its nodes as the plan takes them, all alike."""
        return Nodes(device=self.device, nodes=self.nodes, devices_per_node=self.devices_per_node, intra=self.intra)


def check_cluster(cluster: Cluster, world_size: int) -> None:
    """Raise SettingError where the cluster is empty, has impossible rates or is smaller than the layout."""
    for number, group in enumerate(cluster.groups):
        check_nodes(group, f"cluster.groups[{number}]")
    check_nodes(cluster.plain(), "cluster")
    check_link(cluster.inter, "cluster.inter")
    check_range("cluster.nodes x devices_per_node", cluster.devices, 1, MOST_DEVICES)
    if cluster.price_per_device_hour is not None:
        check_range("cluster.price_per_device_hour", cluster.price_per_device_hour, 0.0, MOST_PRICE)
    if cluster.device_hours_per_failure is not None:
        check_range("cluster.device_hours_per_failure", cluster.device_hours_per_failure, 1.0, MOST)
    if world_size > cluster.devices:
        raise SettingError(
            f"layout of {world_size} ranks",
            f"more ranks than devices: the cluster has {cluster.label()}",
            f"sizes that multiply to {cluster.devices}",
        )


def check_nodes(nodes: Nodes, prefix: str) -> None:
    """Raise SettingError where nodes are none, are empty or have impossible rates."""
    device = nodes.device
    for setting, value, low, high in (
        ("nodes", nodes.nodes, 1, MOST_DEVICES),
        ("devices_per_node", nodes.devices_per_node, 1, MOST_DEVICES),
        ("device.memory_bytes", device.memory_bytes, 1.0, MOST),
        ("device.memory_bytes_per_s", device.memory_bytes_per_s, 1.0, MOST),
    ):
        check_range(f"{prefix}.{setting}", value, low, high)
    for precision, value in (
        ("bf16", device.peak_bf16_flops_per_s),
        ("fp32", device.peak_fp32_flops_per_s),
        ("fp16", device.peak_fp16_flops_per_s),
        ("fp8", device.peak_fp8_flops_per_s),
        ("fp4", device.peak_fp4_flops_per_s),
    ):
        setting = f"{prefix}.device.peak_{precision}_flops_per_s"
        check_range(setting, value, 0.0, MOST)
        if 0 < value < 1:
            raise SettingError(f"{setting} = {value}", "must be at least 1, or 0 for none", f"{setting} = 0.0")
    check_link(nodes.intra, f"{prefix}.intra")


def check_link(link: Link, prefix: str) -> None:
    """Raise SettingError for a link that moves nothing, or takes forever."""
    check_range(f"{prefix}.bytes_per_s", link.bytes_per_s, 1.0, MOST)
    check_range(f"{prefix}.latency_s", link.latency_s, 0.0, 1e3)
