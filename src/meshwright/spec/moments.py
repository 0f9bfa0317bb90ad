"""When a rank of a pipeline holds most, as its schedule has it."""

from collections.abc import Sequence
from operator import le
from typing import NamedTuple

from meshwright.spec.schedule import Action, Pass

# Microbatches that a pass adds to those whose stage keeps what its backward pass needs, and to those whose backward
# pass has put products off. (A whole backward pass of a schedule that cuts others in two makes up for its own at once.)
KEPT: dict[Pass, int] = {"F": 1, "B": -1, "I": -1, "W": 0}
PUT_OFF: dict[Pass, int] = {"F": 0, "B": 0, "I": 1, "W": -1}


class Moment(NamedTuple):
    """Microbatches of each of a rank's stages, first to last.

    kept: between forward and backward pass. put_off: between the two halves of a backward pass that is cut in two.
    """

    kept: tuple[int, ...]
    put_off: tuple[int, ...]


def fullest_moments(actions: Sequence[Action]) -> tuple[Moment, ...]:
    """Of a rank's passes in order, the moments at which a backward pass begins and no other has as many of all."""
    place = {stage: index for index, stage in enumerate(sorted({action.stage for action in actions}))}
    kept, put_off = [0] * len(place), [0] * len(place)
    seen: set[Moment] = set()
    # Between two backward passes without a rise there are fewer each time.
    risen = False
    for kind, stage, _ in actions:
        if kind in ("B", "I") and risen:
            seen.add(Moment(tuple(kept), tuple(put_off)))
        risen = kind in ("F", "I") or (risen and kind == "W")
        kept[place[stage]] += KEPT[kind]
        put_off[place[stage]] += PUT_OFF[kind]
    fullest: list[Moment] = []
    for moment in sorted(seen, key=count_all, reverse=True):
        if not any(is_within(moment, other) for other in fullest):
            fullest.append(moment)
    return tuple(fullest)


def count_all(moment: Moment) -> int:
    """All of its microbatches together."""
    return sum(moment.kept) + sum(moment.put_off)


def is_within(one: Moment, other: Moment) -> bool:
    """Whether no number of `one` is above its counterpart."""
    return all(map(le, one.kept, other.kept)) and all(map(le, one.put_off, other.put_off))
