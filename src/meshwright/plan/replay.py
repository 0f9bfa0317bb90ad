"""A pipeline's schedule replayed pass by pass: when each begins, waits included, and when the last one ends."""

from collections.abc import Callable, Sequence

import msgspec

from meshwright.spec import Action, Layout, Table, build_schedule, stage_count

# A steady schedule repeats itself; so many rounds of as many microbatches as ranks are replayed, the rest is reckoned.
ROUNDS = 6


class Timetable(msgspec.Struct, frozen=True, kw_only=True):
    """A schedule's table, shortened where a step has more microbatches than tell anything new.

    microbatches: of the table; repeats: rounds left out, of `per_round` microbatches each. alive: for each rank the
    microbatches between their passes, one number for each of its stages, at each moment that could be the fullest.
    """

    table: Table
    microbatches: int
    per_round: int
    repeats: int
    alive: tuple[tuple[tuple[int, ...], ...], ...]


def build_timetable(layout: Layout, microbatches: int) -> Timetable:
    """The timetable of a step of `microbatches` on each rank."""
    if layout.pipeline == 1:
        # One after another, as many as there are.
        alone = build_schedule(layout, 1)
        return Timetable(table=alone, microbatches=1, per_round=1, repeats=microbatches - 1, alive=(((1,),),))
    per_round = layout.pipeline
    if layout.schedule in ("interleaved", "zero-bubble"):
        per_round = microbatches // max(1, microbatches // layout.pipeline)
    repeats = max(0, microbatches // per_round - ROUNDS)
    # With gpipe every microbatch is alive at once, however many there are.
    if layout.schedule == "gpipe":
        repeats = 0
    shortened = microbatches - repeats * per_round
    table = build_schedule(layout, shortened)
    alive = tuple(fullest_moments(rank) for rank in table)
    return Timetable(table=table, microbatches=shortened, per_round=per_round, repeats=repeats, alive=alive)


def fullest_moments(actions: Sequence[Action]) -> tuple[tuple[int, ...], ...]:
    """Microbatches of each of a rank's stages after a forward pass, where no other moment has as many of all."""
    stages = sorted({action.stage for action in actions})
    count = [0] * len(stages)
    seen: set[tuple[int, ...]] = set()
    for kind, stage, _ in actions:
        place = stages.index(stage)
        if kind == "F":
            count[place] += 1
            seen.add(tuple(count))
        elif kind != "I":
            # Of a backward pass cut in two, the second half still needs what the forward pass kept.
            count[place] -= 1
    return tuple(one for one in seen if not any(one != other and within(one, other) for other in seen))


def within(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether no number of `one` is above its counterpart."""
    return all(a <= b for a, b in zip(one, other, strict=True))


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """When each rank's passes begin, in the table's order, and end; seconds from the step's begin.

    steady_s: how long another round of microbatches would take.
    """

    begins_s: tuple[tuple[float, ...], ...]
    ends_s: tuple[tuple[float, ...], ...]
    finish_s: float
    steady_s: float


# Seconds of a pass; seconds from the end of a stage's pass until the stage after (or before) has what it sends.
Duration = Callable[[Action], float]
Hops = Sequence[float]


def replay(layout: Layout, timetable: Timetable, duration: Duration, hops: Hops) -> Replay:
    """Run every rank's passes as soon as it is free and what they wait for has arrived.

    hops: of each stage but the first, from the stage before it or to it.
    """
    table, last = timetable.table, stage_count(layout) - 1
    # When a stage's forward pass of a microbatch has ended, and when the gradient of its input is there.
    ahead: list[list[float | None]] = [[None] * timetable.microbatches for _ in range(last + 1)]
    back: list[list[float | None]] = [[None] * timetable.microbatches for _ in range(last + 1)]
    position, free = [0] * len(table), [0.0] * len(table)
    begins: list[list[float]] = [[] for _ in table]
    ends: list[list[float]] = [[] for _ in table]
    left, moved = sum(map(len, table)), True
    while left and moved:
        moved = False
        for rank, actions in enumerate(table):
            while position[rank] < len(actions):
                action = actions[position[rank]]
                kind, stage, each = action
                ready: float | None = 0.0
                if kind == "F" and stage:
                    ready = ahead[stage - 1][each]
                    ready = None if ready is None else ready + hops[stage]
                elif kind in "BI" and stage < last:
                    ready = back[stage + 1][each]
                    ready = None if ready is None else ready + hops[stage + 1]
                if ready is None:
                    break
                begin = max(ready, free[rank])
                end = free[rank] = begin + duration(action)
                if kind == "F":
                    ahead[stage][each] = end
                elif kind != "W":
                    back[stage][each] = end
                begins[rank].append(begin)
                ends[rank].append(end)
                position[rank] += 1
                left, moved = left - 1, True
    assert not left, "the schedule waits for itself"
    return Replay(
        begins_s=tuple(map(tuple, begins)),
        ends_s=tuple(map(tuple, ends)),
        finish_s=max(free) + timetable.repeats * steady_seconds(timetable, ahead[last]),
        steady_s=steady_seconds(timetable, ahead[last]),
    )


def steady_seconds(timetable: Timetable, ended: Sequence[float | None]) -> float:
    """From the middle of the table: how much later the last stage ends a microbatch a round on. ended: its passes."""
    if not timetable.repeats:
        return 0.0
    middle = timetable.microbatches - 2 * timetable.per_round
    one, other = ended[middle - timetable.per_round], ended[middle]
    assert one is not None and other is not None
    return other - one
