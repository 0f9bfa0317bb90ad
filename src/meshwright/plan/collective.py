"""Seconds of a collective along an axis, where the layout puts it."""

import msgspec

from meshwright.plan.rates import Collective, Rates
from meshwright.spec import Axis, Cluster, Layout


class Ring(msgspec.Struct, frozen=True, kw_only=True):
    """The ring that an axis's ranks form over the cluster's links.

    nodes: nodes that one group spans. link_bytes_per_s: what each member sends and receives around the ring.
    """

    size: int
    nodes: int
    link_bytes_per_s: float
    round_s: float


def build_ring(layout: Layout, axis: Axis, cluster: Cluster) -> Ring:
    """The ring of one group along `axis`.

    Ranks are numbered with the last axis of `layout.order` fastest and fill node after node. A group inside a node
    uses the inner link. One that spans nodes crosses each border once a direction, over as many ports as it has
    members there: other groups use the ports of their own members at the same time.
    """
    size, stride = layout.size(axis), stride_of(layout, axis)
    per_node = cluster.devices_per_node
    span = stride * size
    if span <= per_node or layout.world_size <= per_node:
        return Ring(size=size, nodes=1, link_bytes_per_s=cluster.intra.bytes_per_s, round_s=cluster.intra.latency_s)
    members = max(1, per_node // stride)
    nodes = -(-size // members)
    inside, across = cluster.intra, cluster.inter
    return Ring(
        size=size,
        nodes=nodes,
        link_bytes_per_s=min(inside.bytes_per_s, across.bytes_per_s * members) if members > 1 else across.bytes_per_s,
        # A round passes every link at once, so it lasts as long as the slowest; the ring has one border a node.
        round_s=((size - nodes) * inside.latency_s + nodes * across.latency_s) / size,
    )


def stride_of(layout: Layout, axis: Axis) -> int:
    """Distance in rank numbers between neighbours along `axis`."""
    stride = 1
    for inner in layout.order[layout.order.index(axis) + 1 :]:
        stride *= layout.size(inner)
    return stride


def predict_collective(kind: Collective, whole_bytes: float, ring: Ring, rates: Rates) -> float:
    """Seconds to all-reduce, gather or reduce-scatter `whole_bytes` (the size of the whole, not of a rank's part).

    A ring passes size - 1 parts around once; an all-reduce twice. Latencies add up over the rounds (NCCL's trees need
    fewer for small all-reduces across many nodes: there this is an upper bound).
    """
    if ring.size == 1:
        return 0.0
    rounds = (ring.size - 1) * (2 if kind == "all_reduce" else 1)
    moved_bytes = rounds * whole_bytes / ring.size
    return moved_bytes / (ring.link_bytes_per_s * rates.links[kind]) + rounds * ring.round_s
