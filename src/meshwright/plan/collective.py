"""Seconds of a collective along an axis, where the layout puts it."""

from collections import Counter
from collections.abc import Sequence
from itertools import product

import msgspec

from meshwright.spec import Axis, Cluster, Collective, Layout, Rates

PAIR = 2


class Ring(msgspec.Struct, frozen=True, kw_only=True):
    """The ring that an axis's ranks form over the cluster's links.

    nodes: nodes that one group spans. link_bytes_per_s: what each member sends and receives around the ring.
    """

    size: int
    nodes: int
    link_bytes_per_s: float
    round_s: float


def build_ring(layout: Layout, axis: Axis, cluster: Cluster) -> Ring:
    """The ring of one group along `axis`."""
    return place_ring(ranks_along(layout, (axis,)), layout.world_size, cluster)


def build_shard_ring(layout: Layout, cluster: Cluster, *, one_port: bool = False) -> Ring:
    """The ring that parameters are sharded over: shard and context as one. one_port: as Trainer says."""
    axes: list[Axis] = [axis for axis in layout.order if axis in ("shard", "context")]
    ring = place_ring(ranks_along(layout, axes), layout.world_size, cluster)
    if one_port and ring.nodes > 1:
        return msgspec.structs.replace(ring, link_bytes_per_s=cluster.inter.bytes_per_s)
    return ring


def build_expert_rings(layout: Layout, cluster: Cluster) -> tuple[Ring, Ring]:
    """The ring that tokens are exchanged over, and the ring that each routed expert is sharded over.

    Both divide the ranks of shard, context and tensor, counted in that order; neighbours have different experts.
    """
    ranks, world_size = ranks_along(layout, ("shard", "context", "tensor")), layout.world_size
    return (
        place_ring(ranks[: layout.expert], world_size, cluster),
        place_ring(ranks[:: layout.expert], world_size, cluster),
    )


def ranks_along(layout: Layout, axes: Sequence[Axis]) -> Sequence[int]:
    """The ranks of the first group along these axes together, the last of them fastest; a range where they are one."""
    levels = [(layout.size(axis), stride_of(layout, axis)) for axis in axes if layout.size(axis) > 1]
    stride, size = (levels[-1][1], 1) if levels else (1, 1)
    for more, apart in reversed(levels):
        if apart != stride * size:
            starts = (range(0, count * step, step) for count, step in levels)
            return [sum(places) for places in product(*starts)]
        size *= more
    return range(0, size * stride, stride)


def place_ring(ranks: Sequence[int], world_size: int, cluster: Cluster) -> Ring:
    """The ring of these ranks.

    Ranks are numbered with the last axis of `layout.order` fastest and fill node after node. A group inside a node
    uses the inner link. One that spans nodes crosses each border once a direction, over as many ports as it has
    members there: other groups use the ports of their own members at the same time.
    """
    size, inside, across = len(ranks), cluster.intra, cluster.inter
    nodes, members = spread_over(ranks, cluster.devices_per_node)
    if nodes == 1 or world_size <= cluster.devices_per_node:
        return Ring(size=size, nodes=1, link_bytes_per_s=inside.bytes_per_s, round_s=inside.latency_s)
    return Ring(
        size=size,
        nodes=nodes,
        link_bytes_per_s=min(inside.bytes_per_s, across.bytes_per_s * members) if members > 1 else across.bytes_per_s,
        # A round passes every link at once, so it lasts as long as the slowest; the ring has one border a node.
        round_s=((size - nodes) * inside.latency_s + nodes * across.latency_s) / size,
    )


def spread_over(ranks: Sequence[int], per_node: int) -> tuple[int, int]:
    """How many nodes these ranks are on, and how many of them on each, where that differs on one of them."""
    if isinstance(ranks, range):
        members = max(1, per_node // ranks.step)
        return -(-len(ranks) // members), members
    held = Counter(rank // per_node for rank in ranks)
    return len(held), min(held.values())


def stride_of(layout: Layout, axis: Axis) -> int:
    """Distance in rank numbers between neighbours along `axis`."""
    stride = 1
    for inner in layout.order[layout.order.index(axis) + 1 :]:
        stride *= layout.size(inner)
    return stride


def predict_collective(kind: Collective, whole_bytes: float, ring: Ring, rates: Rates) -> float:
    """Seconds to all-reduce, gather or reduce-scatter `whole_bytes` (the size of the whole, not of a rank's part).

    A ring passes size - 1 parts around once; an all-reduce twice. Between two nodes NCCL's trees sum with one exchange
    of the whole. Latencies add up over the rounds (trees need fewer for small all-reduces across many nodes: there this
    is an upper bound).
    """
    if ring.size == 1:
        return 0.0
    rounds = (ring.size - 1) * (2 if kind == "all_reduce" else 1)
    moved_bytes = rounds * whole_bytes / ring.size
    if kind == "all_reduce" and ring.nodes == PAIR:
        moved_bytes = whole_bytes
    return moved_bytes / (ring.link_bytes_per_s * rates.links[kind]) + rounds * ring.round_s * rates.latencies[kind]


def predict_exchange(rank_bytes: float, ring: Ring, cluster: Cluster, rates: Rates) -> float:
    """Seconds of an all-to-all in which each rank of a group has `rank_bytes`, a part of it for each.

    Every part goes its own way: what leaves the node goes through the rank's own port, the rest over the inner link.
    """
    if ring.size == 1:
        return 0.0
    members = ring.size / ring.nodes
    inside_s = rank_bytes * (members - 1) / ring.size / (cluster.intra.bytes_per_s * rates.links["all_to_all"])
    across_s = rank_bytes * (ring.size - members) / ring.size / (cluster.inter.bytes_per_s * rates.links["all_to_all"])
    latency_s = cluster.inter.latency_s if ring.nodes > 1 else cluster.intra.latency_s
    return max(inside_s, across_s) + latency_s * rates.latencies["all_to_all"]


def hop_seconds(layout: Layout, cluster: Cluster, ranks: tuple[int, int], size_bytes: float, rates: Rates) -> float:
    """Seconds until what one rank of the pipeline axis sends has reached another."""
    if ranks[0] == ranks[1]:
        return 0.0
    stride, per_node = stride_of(layout, "pipeline"), cluster.devices_per_node
    near = layout.world_size <= per_node or ranks[0] * stride // per_node == ranks[1] * stride // per_node
    link = cluster.intra if near else cluster.inter
    return size_bytes / (link.bytes_per_s * rates.links["send"]) + link.latency_s * rates.latencies["send"]
