"""The step's order of compute and transfers, walked piece by piece: what of the transfers is exposed."""

from collections.abc import Sequence

import msgspec

from meshwright.plan.work import Piece


class Walk(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of passes over the model: compute, copies included; transfers in all; and their exposed part."""

    compute_s: float = 0.0
    shard_s: float = 0.0
    replica_s: float = 0.0
    exposed_shard_s: float = 0.0
    exposed_replica_s: float = 0.0

    def __add__(self, other: "Walk") -> "Walk":
        names = self.__struct_fields__
        return Walk(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def repeated(self, times: int) -> "Walk":
        """The same passes `times` over."""
        return Walk(**{name: getattr(self, name) * times for name in self.__struct_fields__})


def walk_forward(pieces: Sequence[Piece], *, gathers: bool, overlaps: bool) -> Walk:
    """A forward pass.

    While a piece computes, the next one is gathered (FSDP's prefetch goes one ahead), so only the first gather and
    what a piece's compute is too short to cover are exposed.
    """
    compute_s = sum(p.forward_s + (p.copy_out_s if gathers else 0.0) for p in pieces)
    shard_s = sum(p.gather_s for p in pieces) if gathers else 0.0
    if not overlaps or not shard_s:
        return Walk(compute_s=compute_s, shard_s=shard_s, exposed_shard_s=shard_s)
    now_s, ready_s, waited_s = 0.0, pieces[0].gather_s, 0.0
    for index, piece in enumerate(pieces):
        waited_s += max(0.0, ready_s - now_s)
        now_s = max(now_s, ready_s)
        if index + 1 < len(pieces):
            ready_s = now_s + pieces[index + 1].gather_s
        now_s += piece.copy_out_s + piece.forward_s
    return Walk(compute_s=compute_s, shard_s=shard_s, exposed_shard_s=waited_s)


def walk_backward(
    pieces: Sequence[Piece], *, gathers: bool, scatters: bool, all_reduces: bool, accumulates: bool, overlaps: bool
) -> Walk:
    """A backward pass, from the last piece to the first.

    Gathers and reductions share the links and are sent in the order in which FSDP issues them: the next piece's
    gather when a piece begins, a piece's reduction when it ends. FSDP keeps one reduction in flight: a piece that
    ends before the previous one's reduction waits for it. The last reduction is exposed.
    """
    order = list(reversed(pieces))
    # The head stays whole between the passes; the root is gathered first of all, when the backward pass begins.
    gathered_s = [0.0] + [p.gather_s for p in order[1:]] if gathers else [0.0] * len(order)
    reduced_s = [(p.scatter_s if scatters else 0.0) + (p.all_reduce_s if all_reduces else 0.0) for p in order]
    reduces = scatters or all_reduces
    computed_s = [
        p.backward_s
        + (p.copy_out_s if gathers and index else 0.0)
        + (p.copy_in_s if reduces else 0.0)
        + (p.accumulate_s if accumulates else 0.0)
        for index, p in enumerate(order)
    ]
    shard_s = sum(gathered_s) + (sum(p.scatter_s for p in order) if scatters else 0.0)
    replica_s = sum(p.all_reduce_s for p in order) if all_reduces else 0.0
    whole = Walk(compute_s=sum(computed_s), shard_s=shard_s, replica_s=replica_s)
    if not overlaps:
        return msgspec.structs.replace(whole, exposed_shard_s=shard_s, exposed_replica_s=replica_s)
    gather_wait_s, reduce_wait_s = overlap_backward(computed_s, gathered_s, reduced_s)
    replica_share = replica_s / sum(reduced_s) if replica_s else 0.0
    return msgspec.structs.replace(
        whole,
        exposed_shard_s=gather_wait_s + reduce_wait_s * (1 - replica_share),
        exposed_replica_s=reduce_wait_s * replica_share,
    )


def overlap_backward(
    computed_s: Sequence[float], gathered_s: Sequence[float], reduced_s: Sequence[float]
) -> tuple[float, float]:
    """Seconds that compute waits for gathers and for reductions, the tail included."""
    now_s, gather_wait_s, reduce_wait_s = 0.0, 0.0, 0.0
    # When the links are free, when the coming piece is whole, when the reduction in flight ends.
    links_s = gathered_s[-1]
    ready_s, in_flight_s = 0.0, 0.0
    last = len(computed_s) - 1
    for index, compute_s in enumerate(computed_s):
        gather_wait_s += max(0.0, ready_s - now_s)
        now_s = max(now_s, ready_s)
        if index + 1 < last:
            links_s = max(links_s, now_s) + gathered_s[index + 1]
            ready_s = links_s if gathered_s[index + 1] else 0.0
        now_s += compute_s
        if reduced_s[index]:
            reduce_wait_s += max(0.0, in_flight_s - now_s)
            now_s = max(now_s, in_flight_s)
            links_s = in_flight_s = max(links_s, now_s) + reduced_s[index]
    return gather_wait_s, reduce_wait_s + max(0.0, in_flight_s - now_s)
