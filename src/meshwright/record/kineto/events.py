"""What both readers need of a profiler trace in Kineto's Chrome format. Times there are microseconds; here seconds."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from meshwright.account.intervals import Interval, union

# Annotations that the training loop puts around its phases, and recompute around what a backward pass runs again; STEP
# around the whole step.
PREFIX = "meshwright."
STEP = f"{PREFIX}step"
# Around transfers of the expert axis; and a mark that ends in the number of rows that a rank's experts were sent.
EXPERT = f"{PREFIX}expert"
ROWS = f"{PREFIX}rows."
PHASES = ("input", "forward", "backward", "recompute", "optimizer", "control", "checkpoint")

TraceEvent = dict[str, Any]


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
