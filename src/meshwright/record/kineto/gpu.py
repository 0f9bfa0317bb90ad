"""A GPU rank's step: from the end of the previous step's last kernel to the end of its own, or to where the host, if it
is behind the device, ends the one and begins the other."""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence

from meshwright.account import Purpose, Transfer
from meshwright.account.intervals import Interval, intersect, subtract, union
from meshwright.record.kineto.events import STEP, MessageSpan, TraceEvent, message_spans, phase_of, phases, span, within
from meshwright.record.timeline import Timeline, contention, numbered

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCH = ("cuda_runtime", "cuda_driver")

# Phases whose kernels are not compute but have a bucket of their own.
APART = ("optimizer", "recompute")

# A launch reaches an idle device in about this time; longer means that the kernel waited for another stream.
# Measured on idle H200s: from the end of a launch to the start of its kernel 1.1 us in the median, 1.9 us at most in
# nine of ten of 87 kernels (torch 2.11, 2026-11-22).
LAUNCH_LATENCY_S = 10e-6


def gpu_timeline(
    events: Sequence[TraceEvent],
    groups: Mapping[str, tuple[str, tuple[int, ...]]],
    purposes: Mapping[str, Purpose],
) -> Timeline:
    """The last step of a GPU trace that holds at least two: the first one marks where the second begins."""
    step, during = phases(events)
    launched = {e["args"]["correlation"]: span(e) for e in events if e.get("cat") in LAUNCH and "args" in e}
    device = sorted((e for e in events if e.get("cat") in ON_DEVICE), key=lambda e: e["ts"])
    start, end = device_window(events, step, device, launched)
    inside = [e for e in device if start < span(e)[1] and span(e)[0] < end]
    kernels = [e for e in inside if not is_nccl(e)]
    sent = [message for message in message_spans(events) if message.what != "take" or message.number < 0]
    transfers = numbered(
        [transfer_of(e, launch_of(e, launched)[0], groups, purposes, during, sent) for e in inside if is_nccl(e)]
    )
    updating, again = (
        union(span(e) for e in kernels if within(launch_of(e, launched)[0], during[phase])) for phase in APART
    )
    working = subtract(union(span(e) for e in kernels), union([*updating, *again]))
    hosted = subtract(host_operators(events, step, during["optimizer"]), union(span(e) for e in inside))
    # Behind the last kernel nothing is launched any more in this step, and the host has not ended it yet.
    last = max((span(e)[1] for e in inside), default=start)
    late = union([*late_launches(start, kernels, launched), (last, end)])
    stalled = {name: intersect(late, during[name]) for name in ("input", "checkpoint")}
    return Timeline(
        start_s=start,
        end_s=end,
        busy={"optimizer": union([*updating, *hosted]), "recompute": again, "compute": working},
        waits={**stalled, "host": late},
        transfers=transfers,
        contention_s=slowed(kernels, transfers, during, launched),
    )


def is_nccl(event: TraceEvent) -> bool:
    """Whether a device event is a collective's kernel."""
    return "nccl" in str(event["name"]).lower()


def launch_of(event: TraceEvent, launched: Mapping[int, Interval]) -> Interval:
    """When the host launched a device event; the event's own time where the trace does not say."""
    return launched.get(event.get("args", {}).get("correlation", -1), span(event))


def device_window(
    events: Sequence[TraceEvent], step: TraceEvent, device: Sequence[TraceEvent], launched: Mapping[int, Interval]
) -> Interval:
    """From the end of the last kernel launched before the step to the end of the last launched in it; from the host's
    start to the host's end where these are later."""
    opened, closed = span(step)
    if sum(1 for e in events if e["name"] == STEP and e.get("cat") == "user_annotation") < 2:
        raise ValueError("a GPU step is bounded by the step before it, and the trace holds only one")
    before = [span(e)[1] for e in device if launch_of(e, launched)[0] < opened]
    during = [span(e)[1] for e in device if opened <= launch_of(e, launched)[0] <= closed]
    if not before or not during or max(during) <= max(before):
        raise ValueError("the trace holds no kernels of the annotated step")
    return max(*before, opened), max(*during, closed)


def host_operators(events: Sequence[TraceEvent], step: TraceEvent, phases: Sequence[Interval]) -> list[Interval]:
    """When the host's own cores were at work in the step's `phases`: operators that launch nothing, by themselves or
    inside, and are inside none that does."""
    mine = [e for e in events if e.get("tid") == step["tid"] and within(span(e)[0], phases)]
    launches = sorted(span(e)[0] for e in mine if e.get("cat") in LAUNCH)
    found: list[Interval] = []
    free = 0.0
    for start, end in sorted((span(e) for e in mine if e.get("cat") == "cpu_op"), key=lambda s: (s[0], -s[1])):
        if start < free:
            continue
        free = end
        if bisect_right(launches, end) == bisect_left(launches, start):
            found.append((start, end))
    return union(found)


def transfer_of(
    event: TraceEvent,
    launch: float,
    groups: Mapping[str, tuple[str, tuple[int, ...]]],
    purposes: Mapping[str, Purpose],
    during: Mapping[str, list[Interval]],
    sent: Sequence[MessageSpan],
) -> Transfer:
    """A transfer's kernel, with the process group that the trace names, or between the ranks that its launch names.

    Its phase may say what it is for, whatever else its group carries.
    """
    args = event.get("args", {})
    description, ranks = groups.get(str(args.get("Process Group Name", "")), ("", ()))
    described = str(args.get("Process Group Description", description))
    start, end = span(event)
    purpose = phase_of(launch, during) or purposes.get(described, "control")
    position = bisect_right(sent, launch, key=lambda message: message.interval[0]) - 1
    if position >= 0 and launch <= sent[position].interval[1]:
        message = sent[position]
        ends = (message.source, message.target)
        return Transfer(purpose="pipeline", ranks=ends, index=message.number, start_s=start, end_s=end)
    return Transfer(purpose=purpose, ranks=ranks, index=0, start_s=start, end_s=end)


def late_launches(start: float, kernels: Sequence[TraceEvent], launched: Mapping[int, Interval]) -> list[Interval]:
    """Device idle before a kernel that the host had not launched yet when the device ran out of work.

    The idle stretch counts up to the launch; from there to the kernel's start the device was told and waited for
    something else, except for the few microseconds that a launch takes to arrive, which belong to it.
    """
    late: list[Interval] = []
    free = start
    for event in kernels:
        begin, end = span(event)
        if begin > free:
            launch = launch_of(event, launched)[1]
            if launch > free:
                arrived = launch + LAUNCH_LATENCY_S
                late.append((free, begin if begin <= arrived else launch))
        free = max(free, end)
    return union(late)


def slowed(
    kernels: Sequence[TraceEvent],
    transfers: Sequence[Transfer],
    during: Mapping[str, list[Interval]],
    launched: Mapping[int, Interval],
) -> float:
    """Contention of compute kernels: those that ran beside a transfer against the same ones alone."""
    moving = union([(t.start_s, t.end_s) for t in transfers])
    samples: dict[str, list[tuple[float, bool]]] = defaultdict(list)
    for event in kernels:
        if any(within(launch_of(event, launched)[0], during[phase]) for phase in APART):
            continue
        start, end = span(event)
        args = event.get("args", {})
        same = f"{event['name']} {args.get('grid')} {args.get('block')}"
        samples[same].append((end - start, bool(intersect(moving, [(start, end)]))))
    return contention(samples)
