"""A pipeline's schedule replayed pass by pass: when each begins, waits included, and when the last one ends."""

from collections.abc import Sequence
from itertools import pairwise

import msgspec

from meshwright.spec import (
    Action,
    Layout,
    Moment,
    Table,
    build_schedule,
    fullest_moments,
    held_stages,
    is_within,
    rank_schedule,
    stage_count,
)

# A steady schedule repeats itself; so many rounds of as many microbatches as ranks are replayed, the rest is reckoned.
ROUNDS = 6
# Two rounds that differ by less are alike.
ALIKE = 1e-6
# What a stage's passes can differ in: forward of a step's first microbatch or another, backward (whole, or of its
# input, or of its weights) of another or the last.
KINDS = ("first F", "F", "B", "last B", "I", "last I", "W", "last W")
# Seconds of each of a stage's KINDS.
Seconds = Sequence[float]
# One pass: stage, microbatch, which of KINDS.
Step = tuple[int, int, int]


class Timetable(msgspec.Struct, frozen=True, kw_only=True):
    """A schedule's table, shortened where a step has more microbatches than tell anything new.

    steps: the table with each pass's place in KINDS. microbatches: of the table; repeats: rounds left out, of
    `per_round` microbatches each. alive: for each rank the microbatches between their passes at each moment that could
    be the fullest; emptier: whether the rank before it never has fewer.
    """

    table: Table
    steps: tuple[tuple[Step, ...], ...]
    microbatches: int
    per_round: int
    repeats: int
    alive: tuple[tuple[Moment, ...], ...]
    emptier: tuple[bool, ...]


def build_timetable(layout: Layout, microbatches: int, rounds: int = ROUNDS) -> Timetable:
    """The timetable of a step of `microbatches` on each rank, no more than `rounds` of them in the table."""
    per_round, repeats = split_rounds(layout, microbatches, rounds)
    shortened = microbatches - repeats * per_round
    table = build_schedule(layout, shortened)
    alive = tuple(fullest_moments(rank) for rank in table)
    covered = (all(any(is_within(one, most) for most in before) for one in here) for before, here in pairwise(alive))
    return Timetable(
        table=table,
        steps=tuple(tuple(step_of(action, shortened) for action in rank) for rank in table),
        microbatches=shortened,
        per_round=per_round,
        repeats=repeats,
        alive=alive,
        emptier=(False, *covered),
    )


def end_timetable(layout: Layout, microbatches: int) -> Timetable:
    """The timetable without its passes: what is alive on the first rank, and on the last, which stands for others."""
    per_round, repeats = split_rounds(layout, microbatches)
    shortened, last = microbatches - repeats * per_round, layout.pipeline - 1
    first, other = (fullest_moments(rank_schedule(layout, rank, shortened)) for rank in (0, last))
    return Timetable(
        table=(),
        steps=(),
        microbatches=shortened,
        per_round=per_round,
        repeats=repeats,
        alive=(first, *([other] * last)),
        emptier=(False,) * layout.pipeline,
    )


def split_rounds(layout: Layout, microbatches: int, rounds: int = ROUNDS) -> tuple[int, int]:
    """Microbatches of a round, and how many rounds are left out of the table."""
    per_round = layout.pipeline
    if layout.schedule in ("interleaved", "zero-bubble"):
        per_round = microbatches // max(1, microbatches // layout.pipeline)
    repeats = max(0, microbatches // per_round - rounds)
    if layout.schedule == "gpipe":
        # Every microbatch is alive at once, however many there are.
        repeats = 0
    if layout.pipeline == 1:
        # One after another.
        repeats = microbatches - 1
    return per_round, repeats


def step_of(action: Action, microbatches: int) -> Step:
    """A pass of a table of so many microbatches."""
    kind, stage, each = action
    if kind == "F":
        return stage, each, 1 if each else 0
    return stage, each, {"B": 2, "I": 4, "W": 6}[kind] + (each == microbatches - 1)


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """When each rank's passes end, in the table's order, and the whole step; seconds from its begin.

    steady: whether the rounds in the middle of the table are alike, so that those left out were reckoned right.
    """

    timetable: Timetable
    ends_s: tuple[tuple[float, ...], ...]
    finish_s: float
    steady: bool


def replay_steadily(layout: Layout, timetable: Timetable, seconds: Sequence[Seconds], hops: Sequence[float]) -> Replay:
    """Replay with as many rounds in the table as it takes until they are alike."""
    found, rounds = replay(layout, timetable, seconds, hops), ROUNDS
    while not found.steady:
        rounds *= 2
        longer = build_timetable(layout, timetable.microbatches + timetable.repeats * timetable.per_round, rounds)
        found = replay(layout, longer, seconds, hops)
    return found


def replay(layout: Layout, timetable: Timetable, seconds: Sequence[Seconds], hops: Sequence[float]) -> Replay:
    """Run every rank's passes as soon as it is free and what they wait for has arrived.

    seconds: of each stage's passes. hops: of each stage but the first, until what the one before it sends is there, or
    what goes back.
    """
    last = stage_count(layout) - 1
    # When a stage's forward pass of a microbatch has ended, and when the gradient of its input is there.
    ahead: list[list[float]] = [[-1.0] * timetable.microbatches for _ in range(last + 1)]
    back: list[list[float]] = [[-1.0] * timetable.microbatches for _ in range(last + 1)]
    ends: list[list[float]] = [[] for _ in timetable.steps]
    waiting = list(range(len(ends)))
    while waiting:
        done = sum(map(len, ends))
        for rank in waiting:
            run_rank(timetable.steps[rank], ends[rank], ahead, back, seconds, hops)
        waiting = [rank for rank in waiting if len(ends[rank]) < len(timetable.steps[rank])]
        assert not waiting or sum(map(len, ends)) > done, "the schedule waits for itself"
    finish_s, repeats = max(each[-1] for each in ends), timetable.repeats
    if not repeats:
        return Replay(timetable=timetable, ends_s=tuple(map(tuple, ends)), finish_s=finish_s, steady=True)
    # How much later the last stage ends a microbatch a round on, where neither begin nor end of the step is felt.
    each, ended = timetable.per_round, ahead[last]
    middle = timetable.microbatches - 2 * each
    round_s, before_s = ended[middle] - ended[middle - each], ended[middle - each] - ended[middle - 2 * each]
    return Replay(
        timetable=timetable,
        ends_s=tuple(map(tuple, ends)),
        finish_s=finish_s + repeats * round_s,
        steady=abs(round_s - before_s) <= ALIKE * round_s
        and round_s >= busiest_seconds(layout, seconds) * each * (1 - ALIKE),
    )


def busiest_seconds(layout: Layout, seconds: Sequence[Seconds]) -> float:
    """What a microbatch of the middle takes the busiest rank, which sets the pace once others wait for it."""
    forward, whole = KINDS.index("F"), KINDS.index("B")
    return max(
        sum(seconds[stage][forward] + seconds[stage][whole] for stage in held_stages(layout, rank))
        for rank in range(layout.pipeline)
    )


def run_rank(
    steps: Sequence[Step],
    ends: list[float],
    ahead: list[list[float]],
    back: list[list[float]],
    seconds: Sequence[Seconds],
    hops: Sequence[float],
) -> None:
    """Go on with a rank until it waits for another; `ends`, `ahead` and `back` grow by what it has run."""
    last, free = len(ahead) - 1, ends[-1] if ends else 0.0
    for stage, each, kind in steps[len(ends) :]:
        ready = 0.0
        if kind < 2:
            if stage:
                ready = ahead[stage - 1][each]
                if ready < 0:
                    return
                ready += hops[stage]
        elif kind < 6 and stage < last:
            ready = back[stage + 1][each]
            if ready < 0:
                return
            ready += hops[stage + 1]
        free = (ready if ready > free else free) + seconds[stage][kind]
        if kind < 2:
            ahead[stage][each] = free
        elif kind < 6:
            back[stage][each] = free
        ends.append(free)
