"""Why a device had nothing to do: what the host was at while it launched late."""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence

import msgspec

from meshwright.account.intervals import Interval, clip, intersect, length, subtract, union
from meshwright.record.detail import Gap, HostCause
from meshwright.record.kineto.kernels import own_seconds
from meshwright.record.kineto.marks import COLLECT, PREFIX, PROFILER_STEP, span
from meshwright.record.kineto.steps import Slice
from meshwright.record.kineto.trace import Event
from meshwright.record.kineto.walk import Walk

# Calls in which the host waits until the device has done what it was given, CUDA's and HIP's.
SYNCHRONIZING = (
    *(f"{maker}{what}Synchronize" for maker in ("cuda", "hip") for what in ("Stream", "Device", "Event")),
    *("cudaMemcpy", "hipMemcpy", "cuStreamSynchronize", "cuCtxSynchronize", "cuEventSynchronize"),
    # What an allocator that runs out of memory calls.
    *("cudaFree", "hipFree"),
)
# Of copies that are launched: into memory that is not pinned the call returns once the copy has been made (CUDA runtime
# API, "API synchronization behavior").
TO_HOST, PAGEABLE = "Memcpy DtoH", "Pageable"
# Python between two operators takes microseconds; what takes longer than this does something else than train.
PAUSE_S = 1e-3
# Of a step: enough to see a pattern.
LISTED_GAPS = 10
# A gap shorter than this is what every launch costs.
SHORTEST_GAP_S = 20e-6
NO_OPERATOR = "Python, in no operator"


class HostWork(msgspec.Struct, frozen=True, kw_only=True):
    """What the host did around a step, all threads together; intervals are sorted and disjoint.

    waits: its calls that waited for the device, in order of their end, and the last of the step before. collecting:
    garbage. paused: long stretches of Python in no operator, no call and no library's annotation.
    """

    waits: list[Interval]
    collecting: list[Interval]
    paused: list[Interval]


def host_work(slices: Sequence[Slice], walks: Sequence[Walk], begin_s: float, end_s: float) -> HostWork:
    """What the host did between two moments, of the slices of a trace that hold them."""
    calls = [call for one in slices for call in one.calls]
    marks = [mark for one in slices for mark in one.marks]
    copies = (e for one in slices for e in one.device if e.name.startswith(TO_HOST) and PAGEABLE in e.name)
    blocking = {copy.args.correlation for copy in copies} - {-1}
    *earlier, own = [
        [span(c) for c in one.calls if c.name in SYNCHRONIZING or c.args.correlation in blocking] for one in slices
    ]
    # Of the step before only the last: what the others cost was lost there.
    last = sorted((s for waits in earlier for s in waits), key=lambda s: s[1])[-1:]
    waits = sorted([*last, *own], key=lambda s: s[1])
    collecting = union(span(m) for m in marks if m.name == COLLECT)
    # Libraries' annotations are work; around a loop's steps and phases anything may happen.
    known = [span(m) for m in marks if not m.name.startswith((PREFIX, PROFILER_STEP))]
    active = [interval for walk in walks for own in walk.active.values() for interval in own]
    at_work = union([*active, *known, *(span(c) for c in calls), *collecting])
    quiet = subtract([(begin_s, end_s)], at_work)
    return HostWork(waits=waits, collecting=collecting, paused=[s for s in quiet if s[1] - s[0] > PAUSE_S])


def host_causes(late: Sequence[Interval], work: HostWork) -> dict[HostCause, float]:
    """Seconds of `late`, time in which the device was idle for want of a launch, by what the host was at.

    A host that waited for the device for some time would have been so far ahead of it without the wait: what it
    launched late afterwards is due to that wait, up to its length.
    """
    collecting = intersect(late, work.collecting)
    # A launch still travels when Python has gone on already.
    paused = [s for s in intersect(late, work.paused) if s[1] - s[0] > SHORTEST_GAP_S]
    rest = subtract(late, union([*collecting, *paused]))
    credit = behind = launching = 0.0
    known = 0
    for begin, end in rest:
        while known < len(work.waits) and work.waits[known][0] < end:
            credit += work.waits[known][1] - work.waits[known][0]
            known += 1
        due = min(credit, end - begin)
        credit -= due
        behind += due
        launching += end - begin - due
    found: dict[HostCause, float] = {
        "synchronize": behind,
        "launch": launching,
        "collect": length(collecting),
        "python": length(paused),
    }
    return {cause: seconds for cause, seconds in found.items() if seconds > 0}


def idle_gaps(
    begin_s: float,
    end_s: float,
    busy: Sequence[Event],
    waits: Mapping[str, Sequence[Interval]],
    slices: Sequence[Slice],
) -> tuple[Gap, ...]:
    """The longest stretches in which no device event ran, longest first.

    busy: the device's events, by begin. waits: the intervals of the account's waits, by bucket.
    """
    idle = subtract([(begin_s, end_s)], union(span(e) for e in busy))
    longest = sorted((s for s in idle if s[1] - s[0] >= SHORTEST_GAP_S), key=lambda s: s[0] - s[1])[:LISTED_GAPS]
    starts = [event.start_s for event in busy]
    found: list[Gap] = []
    for begin, end in longest:
        shares = {name: length(clip(sorted(own), begin, end)) for name, own in waits.items()}
        bucket = max(shares, key=lambda name: shares[name], default="other")
        follows = bisect_left(starts, end)
        found.append(
            Gap(
                start_s=begin - begin_s,
                seconds=end - begin,
                bucket=bucket if shares and shares[bucket] > 0 else "other",
                doing=host_activity(begin, end, slices),
                before=busy[follows].name if follows < len(busy) else "",
            )
        )
    return tuple(found)


def host_activity(begin: float, end: float, slices: Sequence[Slice]) -> str:
    """What the host was at for the longest part of a stretch: the innermost annotation, operator or call, moment by
    moment, or Python where it was in none."""
    inside: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    for one in slices:
        for own in (one.calls, one.marks, *one.operators.values()):
            first = bisect_right(own, begin, key=lambda e: e.start_s)
            # What began before the stretch and lasts into it lies not far ahead.
            for event in own[max(0, first - 200) : bisect_left(own, end, key=lambda e: e.start_s)]:
                start, until = max(begin, event.start_s), min(end, event.end_s)
                if start < until and not event.name.startswith((PROFILER_STEP, f"{PREFIX}step")):
                    inside[event.thread].append((start, -until, event.name))
    seconds: dict[str, float] = defaultdict(float)
    for own in inside.values():
        own.sort()
        taken = own_seconds([(start, -until) for start, until, _ in own])
        for (_, _, name), alone in zip(own, taken, strict=True):
            seconds[name] += alone
    covered = union((start, -until) for own in inside.values() for start, until, _ in own)
    seconds[NO_OPERATOR] += end - begin - length(covered)
    return max(seconds, key=lambda name: seconds[name])
