"""What both readers need of a profiler trace in Kineto's Chrome format. Times there are microseconds; here seconds."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from meshwright.account import Purpose
from meshwright.account.intervals import Interval, union

# Annotations that the training loop puts around its phases, recompute around what a backward pass runs again, attention
# around its transfers along context, and experts around theirs; STEP around the whole step.
PREFIX = "meshwright."
STEP = f"{PREFIX}step"
PHASES = ("input", "forward", "backward", "recompute", "context", "expert", "optimizer", "control", "checkpoint")
# A mark that ends in the number of rows that a rank's experts were sent.
ROWS = f"{PREFIX}rows."

TraceEvent = dict[str, Any]

# Around a message between stages of a pipeline: launched by its source, posted by its target ahead of its use, waited
# for by the pass that uses it.
MESSAGES = ("send", "receive", "take")


class MessageSpan(NamedTuple):
    """One such annotation: which ranks of the world the message goes between, and its number among theirs."""

    what: str
    source: int
    target: int
    number: int
    interval: Interval


def message_label(what: str, source: int, target: int, number: int) -> str:
    """The annotation's name."""
    return f"{PREFIX}{what} {source} {target} {number}"


def message_spans(events: Sequence[TraceEvent]) -> list[MessageSpan]:
    """All of them, in order of time."""
    found: list[MessageSpan] = []
    for event in events:
        what, *numbers = str(event["name"]).removeprefix(PREFIX).split(" ")
        if what in MESSAGES and event.get("cat") == "user_annotation" and len(numbers) == 3:
            source, target, number = map(int, numbers)
            found.append(MessageSpan(what, source, target, number, span(event)))
    return sorted(found, key=lambda message: message.interval)


def group_ranks(trace: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Description and ranks of each process group, by its name in the trace."""
    configs = trace.get("distributedInfo", {}).get("pg_config", [])
    return {str(c["pg_name"]): (str(c.get("pg_desc", "")), tuple(c.get("ranks", ()))) for c in configs}


def span(event: TraceEvent) -> Interval:
    """Start and end of an event, seconds."""
    start = float(event["ts"]) * 1e-6
    return start, start + float(event.get("dur", 0.0)) * 1e-6


def phases(events: Sequence[TraceEvent]) -> tuple[TraceEvent, dict[str, list[Interval]]]:
    """The last annotated step on the host, and each phase's intervals, all steps."""
    steps = [e for e in events if e.get("cat") == "user_annotation" and e["name"] == STEP]
    if not steps:
        raise ValueError("the trace holds no annotated step")
    step = max(steps, key=lambda e: e["ts"])
    found: dict[str, list[Interval]] = {name: [] for name in PHASES}
    for event in events:
        name = str(event["name"]).removeprefix(PREFIX)
        if event.get("cat") == "user_annotation" and name in found and event["name"].startswith(PREFIX):
            found[name].append(span(event))
    return step, {name: union(intervals) for name, intervals in found.items()}


def expert_rows(events: Sequence[TraceEvent]) -> tuple[int, ...]:
    """Rows that the rank's experts were sent in the last step, forward pass by forward pass, as marked on the host.

    What recompute marks once more is left out.
    """
    step, during = phases(events)
    start, end = span(step)
    marks = sorted(
        (span(e)[0], int(str(e["name"]).removeprefix(ROWS)))
        for e in events
        if e.get("cat") == "user_annotation" and str(e["name"]).startswith(ROWS)
    )
    return tuple(rows for at, rows in marks if start <= at <= end and not within(at, during["recompute"]))


def within(moment: float, intervals: Sequence[Interval]) -> bool:
    """Whether a moment lies in one of some sorted, disjoint intervals."""
    position = bisect_right(intervals, (moment, float("inf"))) - 1
    return position >= 0 and moment <= intervals[position][1]


def phase_of(moment: float, during: Mapping[str, list[Interval]]) -> Purpose | None:
    """What a collective launched at this moment is for whatever else its group carries, if its phase says so."""
    told: tuple[Purpose, ...] = ("control", "context", "expert")
    return next((purpose for purpose in told if within(moment, during[purpose])), None)
