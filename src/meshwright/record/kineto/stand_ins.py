"""What stands in for transfers on a GPU where one rank runs alone, by the annotation that it was launched in."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from meshwright.account.intervals import Interval
from meshwright.record.kineto.marks import PREFIX, span
from meshwright.record.kineto.purposes import Sent
from meshwright.record.kineto.trace import Event

# Around it; its kind and its process group's description follow.
STAND_IN = f"{PREFIX}stands in for "


class StandIn(NamedTuple):
    """One such annotation."""

    interval: Interval
    kind: str
    description: str


def find_stand_ins(
    marks: Sequence[Event], device: Sequence[Event], launches: Mapping[int, Event]
) -> dict[int, StandIn]:
    """Of device events that stand in for a transfer, by the identity of the event: what for."""
    found: list[StandIn] = []
    for mark in marks:
        if mark.name.startswith(STAND_IN):
            kind, _, description = mark.name.removeprefix(STAND_IN).partition(" ")
            found.append(StandIn(span(mark), kind, description))
    found.sort()
    stand_ins: dict[int, StandIn] = {}
    for event in device if found else ():
        launch_s = launches.get(event.args.correlation, event).start_s
        at = bisect_right(found, launch_s, key=lambda one: one.interval[0]) - 1
        if at >= 0 and launch_s <= found[at].interval[1]:
            stand_ins[id(event)] = found[at]
    return stand_ins


def stand_in_sent(event: Event, stand_in: StandIn, launch_s: float) -> Sent:
    """The transfer that an event stands in for."""
    return Sent(
        kind=stand_in.kind,
        launch_s=launch_s,
        start_s=event.start_s,
        end_s=event.end_s,
        description=stand_in.description,
    )
