"""The step's order of compute and transfers, walked piece by piece: what of the transfers is exposed."""

from collections.abc import Sequence

import msgspec

from meshwright.plan.work import Moves, Piece


class Walk(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of passes over the model: compute, copies included; forward work done again; transfers in all; and
    their exposed part; contention_s: what transfers beside compute slow it by. tensor_s, context_s, expert_s: exposed
    transfers inside blocks, which no overlap is reckoned for here; uneven_s: waiting for the busiest experts.
    """

    compute_s: float = 0.0
    recompute_s: float = 0.0
    tensor_s: float = 0.0
    context_s: float = 0.0
    expert_s: float = 0.0
    uneven_s: float = 0.0
    shard_s: float = 0.0
    replica_s: float = 0.0
    exposed_shard_s: float = 0.0
    exposed_replica_s: float = 0.0
    contention_s: float = 0.0

    def busy_s(self) -> float:
        """All that passes one after another: what the rank is not free in."""
        inside_s = self.tensor_s + self.context_s + self.expert_s + self.uneven_s
        computed_s = self.compute_s + self.recompute_s + self.contention_s
        return computed_s + inside_s + self.exposed_shard_s + self.exposed_replica_s

    def slowed(self, share: float) -> "Walk":
        """The same with compute slowed by this share of the transfers that run beside it."""
        hidden_s = self.shard_s + self.replica_s - self.exposed_shard_s - self.exposed_replica_s
        return msgspec.structs.replace(self, contention_s=share * max(0.0, hidden_s))

    def __add__(self, other: "Walk") -> "Walk":
        names = self.__struct_fields__
        return Walk(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def repeated(self, times: float) -> "Walk":
        """The same passes `times` over."""
        return Walk(**{name: getattr(self, name) * times for name in self.__struct_fields__})


def walk_forward(pieces: Sequence[Piece], *, overlaps: bool) -> Walk:
    """A forward pass of pieces with the copies that it does.

    While a piece computes, the next one is gathered (FSDP's prefetch goes one ahead), so only the first gather and
    what a piece's compute is too short to cover are exposed.
    """
    whole = Walk(
        compute_s=sum(p.count * (p.forward_s + p.copies.copy_out_s) for p in pieces),
        **sum_moves([(p.count, p.forward) for p in pieces]),
        shard_s=sum(p.count * p.copies.gather_s for p in pieces),
    )
    if not overlaps or not whole.shard_s:
        return msgspec.structs.replace(whole, exposed_shard_s=whole.shard_s)
    # Seconds from now until the coming piece is whole.
    ahead_s, waited_s = pieces[0].copies.gather_s, 0.0
    for index, piece in enumerate(pieces):
        busy_s = piece.copies.copy_out_s + piece.forward_s + piece.forward.total()
        # The first waits for what was gathered under the piece before it, the others of its kind under one of them.
        waited_s += max(0.0, ahead_s) + (piece.count - 1) * max(0.0, piece.copies.gather_s - busy_s)
        if index + 1 < len(pieces):
            ahead_s = pieces[index + 1].copies.gather_s - busy_s
    return msgspec.structs.replace(whole, exposed_shard_s=waited_s)


def walk_backward(
    pieces: Sequence[Piece], *, overlaps: bool, last: bool = True, overlaps_reductions: bool = True
) -> Walk:
    """A backward pass, from the last piece to the first, each with the copies that it does.

    Gathers and reductions share the links and are sent in the order in which FSDP issues them: the next piece's
    gather when a piece begins, a piece's reduction when it ends. FSDP keeps one reduction in flight: a piece that
    ends before the previous one's reduction waits for it. Only in a step's last backward pass is the last reduction
    waited for.
    """
    order = list(reversed(pieces))
    # The head stays whole between the passes; the root is gathered first of all, when the backward pass begins.
    stretches = [
        Stretch(
            count=p.count,
            gather_s=p.copies.gather_s if index else 0.0,
            busy_s=p.again_s
            + p.again.total()
            + p.backward.total()
            + (p.backward_s + (p.copies.copy_out_s if index else 0.0) + p.copies.copy_in_s + p.copies.accumulate_s),
            reduce_s=p.copies.scatter_s + p.copies.all_reduce_s,
        )
        for index, p in enumerate(order)
    ]
    recompute_s = sum(p.count * p.again_s for p in order)
    moves = sum_moves([(p.count, part) for p in order for part in (p.again, p.backward)])
    gathered_s = sum(s.count * s.gather_s for s in stretches)
    reduced_s = sum(s.count * s.reduce_s for s in stretches)
    replica_s = sum(p.count * p.copies.all_reduce_s for p in order)
    whole = Walk(
        compute_s=sum(s.count * s.busy_s for s in stretches) - recompute_s - sum(moves.values()),
        recompute_s=recompute_s,
        **moves,
        shard_s=gathered_s + reduced_s - replica_s,
        replica_s=replica_s,
    )
    if not overlaps:
        return msgspec.structs.replace(whole, exposed_shard_s=whole.shard_s, exposed_replica_s=replica_s)
    if not overlaps_reductions:
        # Gathers have the links to themselves, beside compute alone.
        gather_wait_s, _, _ = overlap_backward([msgspec.structs.replace(s, reduce_s=0.0) for s in stretches])
        return msgspec.structs.replace(
            whole, exposed_shard_s=gather_wait_s + reduced_s - replica_s, exposed_replica_s=replica_s
        )
    gather_wait_s, reduce_wait_s, left_s = overlap_backward(stretches)
    reduce_wait_s += left_s if last else 0.0
    replica_share = replica_s / reduced_s if replica_s else 0.0
    return msgspec.structs.replace(
        whole,
        exposed_shard_s=gather_wait_s + reduce_wait_s * (1 - replica_share),
        exposed_replica_s=reduce_wait_s * replica_share,
    )


def sum_moves(parts: Sequence[tuple[int, Moves]]) -> dict[str, float]:
    """Transfers inside passes (how often, which) by the names of Walk, which are theirs."""
    return {name: sum(count * getattr(moves, name) for count, moves in parts) for name in Moves.__struct_fields__}


class Stretch(msgspec.Struct, frozen=True, kw_only=True):
    """Pieces in a row that are alike, in a backward pass: their gather, all that keeps the device busy, reduction."""

    count: int
    gather_s: float
    busy_s: float
    reduce_s: float


class Clock(msgspec.Struct, frozen=True, kw_only=True):
    """Where a backward pass stands: seconds from now until the links are free, the coming piece is whole and the
    reduction in flight ends (negative: since), and what compute has waited for so far.
    """

    links_s: float
    ready_s: float = 0.0
    in_flight_s: float = 0.0
    gather_wait_s: float = 0.0
    reduce_wait_s: float = 0.0

    def waits_like(self, other: "Clock") -> bool:
        """Whether what comes next will wait as after `other`."""
        pairs = ((self.links_s, other.links_s), (self.ready_s, other.ready_s), (self.in_flight_s, other.in_flight_s))
        # What lies in the past delays nothing, however far.
        return all(abs(max(0.0, one) - max(0.0, two)) <= 1e-12 for one, two in pairs)


def overlap_backward(stretches: Sequence[Stretch]) -> tuple[float, float, float]:
    """Seconds that compute waits for gathers and for reductions, and what is left of the last one at the end."""
    clock = Clock(links_s=stretches[-1].gather_s)
    for index, stretch in enumerate(stretches):
        # The root, last, is whole since the pass began.
        following_s = stretches[index + 1].gather_s if index + 2 < len(stretches) else 0.0
        left = stretch.count
        while left > 1:
            before, clock = clock, pass_piece(clock, stretch, stretch.gather_s)
            left -= 1
            if clock.waits_like(before):
                # Settled: each piece up to the last of its kind waits as this one did.
                clock = msgspec.structs.replace(
                    clock,
                    gather_wait_s=clock.gather_wait_s + (left - 1) * (clock.gather_wait_s - before.gather_wait_s),
                    reduce_wait_s=clock.reduce_wait_s + (left - 1) * (clock.reduce_wait_s - before.reduce_wait_s),
                )
                left = 1
        clock = pass_piece(clock, stretch, following_s)
    return clock.gather_wait_s, clock.reduce_wait_s, max(0.0, clock.in_flight_s)


def pass_piece(clock: Clock, piece: Stretch, following_s: float) -> Clock:
    """The clock after one piece's backward pass; following_s: the gather of the piece after it."""
    gather_wait_s = max(0.0, clock.ready_s)
    links_s, in_flight_s = clock.links_s - gather_wait_s, clock.in_flight_s - gather_wait_s
    ready_s = 0.0
    if following_s:
        links_s = ready_s = max(links_s, 0.0) + following_s
    links_s, ready_s, in_flight_s = links_s - piece.busy_s, ready_s - piece.busy_s, in_flight_s - piece.busy_s
    reduce_wait_s = 0.0
    if piece.reduce_s:
        reduce_wait_s = max(0.0, in_flight_s)
        links_s, ready_s = links_s - reduce_wait_s, ready_s - reduce_wait_s
        links_s = in_flight_s = max(links_s, 0.0) + piece.reduce_s
    return Clock(
        links_s=links_s,
        ready_s=ready_s,
        in_flight_s=in_flight_s,
        gather_wait_s=clock.gather_wait_s + gather_wait_s,
        reduce_wait_s=clock.reduce_wait_s + reduce_wait_s,
    )
