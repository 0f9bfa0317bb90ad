"""A GPU rank's step: from the end of the previous step's last kernel to the end of its own, or to where the host, if it
is behind the device, ends the one and begins the other."""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence

import msgspec

from meshwright.account import Purpose, Transfer
from meshwright.account.intervals import Interval, clip, intersect, subtract, union
from meshwright.record.kineto.marks import MessageSpan, message_spans, span, within
from meshwright.record.kineto.peers import ELEMENT_BYTES, PLAIN, Groups, with_peers
from meshwright.record.kineto.phases import Phases
from meshwright.record.kineto.purposes import Sent, kind_of, purposes_of
from meshwright.record.kineto.stand_ins import find_stand_ins, stand_in_sent
from meshwright.record.kineto.steps import HostStep, Slice
from meshwright.record.kineto.trace import Event
from meshwright.record.kineto.walk import Walk
from meshwright.record.timeline import Timeline, contention, numbered

# Phases whose kernels are not compute but have a bucket of their own.
APART = ("optimizer", "recompute")

# A launch reaches an idle device in about this time; longer means that the kernel waited for another stream.
# Measured on idle H200s: from the end of a launch to the start of its kernel 1.1 us in the median, 1.9 us at most in
# nine of ten of 87 kernels (torch 2.11, 2026-11-22).
LAUNCH_LATENCY_S = 10e-6

# From one kernel's end to the begin of the next that is queued behind it: most take 2 us, nine in ten under 4 (6,000
# pairs each of three programs on H200s, torch 2.11, 2026-11-23).
START_S = 5e-6


class DeviceStep(msgspec.Struct, frozen=True, kw_only=True):
    """A step on the device: its begin and end, the events that run in it, and when each was launched, seconds."""

    begin_s: float
    end_s: float
    inside: list[Event]
    launches: Mapping[int, Event]

    def launch(self, event: Event) -> Interval:
        """When the host launched a device event; the event's own time where the trace does not say."""
        return span(self.launches.get(event.args.correlation, event))


def device_step(step: HostStep, device: Sequence[Event], launches: Mapping[int, Event]) -> DeviceStep | None:
    """From the end of the last kernel launched before the step to the end of the last launched in it; from the host's
    begin to the host's end where these are later. None where the step launched nothing.

    device: all device events that run from the step's begin on the host until its last kernel ends, and more.
    """
    begin_s, end_s = step.begin_s, step.end_s
    launched = False
    for event in device:
        at = launches.get(event.args.correlation, event).start_s
        if at < step.begin_s:
            begin_s = max(begin_s, event.end_s)
        elif at <= step.end_s:
            end_s = max(end_s, event.end_s)
            launched = True
    if not launched or end_s <= begin_s:
        return None
    inside = [event for event in device if begin_s < event.end_s and event.start_s < end_s]
    return DeviceStep(begin_s=begin_s, end_s=end_s, inside=inside, launches=launches)


class GpuStep(msgspec.Struct, frozen=True, kw_only=True):
    """A step's timeline, and what its detail is made of. transfers and sent stand side by side."""

    timeline: Timeline
    kernels: list[Event]
    sent: list[Sent]
    late: list[Interval]
    kinds: list[str]


def gpu_step(
    step: HostStep,
    on_device: DeviceStep,
    events: Slice,
    walk: Walk,
    phases: Phases,
    groups: Groups,
    named: Mapping[str, Purpose],
    rank: int,
) -> GpuStep:
    """What ran, what moved and what the device waited for in one step. rank: -1 where it is not known."""
    during = phases.during
    stand_ins = find_stand_ins(events.marks, on_device.inside, on_device.launches)
    kernels = [e for e in on_device.inside if not is_transfer(e) and id(e) not in stand_ins]
    moved = [e for e in on_device.inside if is_transfer(e) or id(e) in stand_ins]
    sent = [
        stand_in_sent(e, stand_ins[id(e)], on_device.launch(e)[0])
        if id(e) in stand_ins
        else sent_of(e, on_device, walk, groups)
        for e in moved
    ]
    messages = [m for m in message_spans(events.marks) if m.what != "take" or m.number < 0]
    sent = with_peers([with_ends(one, messages) for one in sent], walk.records, groups, rank)
    transfers = numbered(
        [
            Transfer(
                purpose=purpose,
                ranks=one.ends or one.ranks,
                index=one.number or 0,
                start_s=one.start_s,
                end_s=one.end_s,
            )
            for one, purpose in zip(sent, purposes_of(sent, phases, walk, named), strict=True)
        ]
    )
    kinds = [kind_at(on_device.launch(e)[0], during) for e in kernels]
    spans = queued_spans(on_device, kernels)
    busy = {kind: union(s for s, own in zip(spans, kinds, strict=True) if own == kind) for kind in (*APART, "compute")}
    taken = union([*busy["optimizer"], *busy["recompute"]])
    running = union(span(e) for e in on_device.inside)
    # Where the optimizer's states lie with the host, its cores are at work while the device is idle.
    hosted = subtract(host_operators(step, events, during["optimizer"]), running)
    # Behind the last kernel nothing is launched any more in this step, and the host has not ended it yet.
    last = max((e.end_s for e in on_device.inside), default=on_device.begin_s)
    late = union([*late_launches(on_device, kernels), (last, on_device.end_s)])
    stalled = {name: intersect(late, during[name]) for name in ("input", "checkpoint")}
    timeline = Timeline(
        start_s=on_device.begin_s,
        end_s=on_device.end_s,
        busy={
            "optimizer": union([*busy["optimizer"], *hosted]),
            "recompute": busy["recompute"],
            "compute": subtract(busy["compute"], taken),
        },
        waits={**stalled, "host": late},
        transfers=transfers,
        contention_s=slowed(kernels, kinds, transfers),
    )
    return GpuStep(timeline=timeline, kernels=kernels, sent=sent, late=late, kinds=kinds)


def is_transfer(event: Event) -> bool:
    """Whether a device event is a collective's kernel, NCCL's or RCCL's."""
    name = event.name.lower()
    return "nccl" in name or "rccl" in name


def kind_at(moment: float, during: Mapping[str, list[Interval]]) -> str:
    """Which bucket a kernel belongs to that was launched at this moment."""
    return next((phase for phase in APART if within(moment, during[phase])), "compute")


def sent_of(event: Event, on_device: DeviceStep, walk: Walk, groups: Groups) -> Sent:
    """A transfer's kernel, with what it or the operator that launched it says of its process group."""
    args, launch_s = event.args, on_device.launch(event)[0]
    if not args.group and not args.description:
        at = bisect_right(walk.records, launch_s, key=lambda record: record.start_s) - 1
        if at >= 0 and launch_s <= walk.records[at].end_s:
            args = walk.records[at].args
    description, ranks = groups.get(args.group, ("", ()))
    size = ELEMENT_BYTES.get(args.dtype)
    return Sent(
        kind=kind_of(args.collective or event.name) or PLAIN,
        launch_s=launch_s,
        start_s=event.start_s,
        end_s=event.end_s,
        group=args.group,
        description=args.description or description,
        ranks=args.ranks or ranks,
        sent_bytes=float(args.elements * size) if size and args.elements >= 0 else None,
    )


def with_ends(sent: Sent, messages: Sequence[MessageSpan]) -> Sent:
    """A message between stages, with the ranks that its launch names."""
    at = bisect_right(messages, sent.launch_s, key=lambda message: message.interval[0]) - 1
    if at < 0 or sent.launch_s > messages[at].interval[1]:
        return sent
    message = messages[at]
    return msgspec.structs.replace(sent, ends=(message.source, message.target), number=message.number)


def host_operators(step: HostStep, events: Slice, phases: Sequence[Interval]) -> list[Interval]:
    """When the host's own cores were at work in the step's `phases`: operators that launch nothing, by themselves or
    inside, and are inside none that does."""
    launches = [call.start_s for call in events.calls if call.thread == step.thread]
    found: list[Interval] = []
    free = -float("inf")
    for operator in events.operators.get(step.thread, ()):
        start, end = span(operator)
        if start < free or not within(start, phases):
            continue
        free = end
        if bisect_right(launches, end) == bisect_left(launches, start):
            found.append((start, end))
    return union(found)


def queued_spans(on_device: DeviceStep, kernels: Sequence[Event]) -> list[Interval]:
    """When each kernel runs, with the moment that the device takes to start one that was queued behind another."""
    found: list[Interval] = []
    free = on_device.begin_s
    for event in kernels:
        begin, end = span(event)
        queued = 0.0 < begin - free <= START_S and on_device.launch(event)[1] <= free
        found.append((free if queued else begin, end))
        free = max(free, end)
    return found


def late_launches(on_device: DeviceStep, kernels: Sequence[Event]) -> list[Interval]:
    """Device idle before a kernel that the host had not launched yet when the device ran out of work.

    The idle stretch counts up to the launch; from there to the kernel's start the device was told and waited for
    something else, except for the few microseconds that a launch takes to arrive, which belong to it.
    """
    late: list[Interval] = []
    free = on_device.begin_s
    for event in kernels:
        begin, end = span(event)
        if begin > free:
            launch = on_device.launch(event)[1]
            if launch > free:
                arrived = launch + LAUNCH_LATENCY_S
                late.append((free, begin if begin <= arrived else launch))
        free = max(free, end)
    return union(late)


def slowed(kernels: Sequence[Event], kinds: Sequence[str], transfers: Sequence[Transfer]) -> float:
    """Contention of compute kernels: those that ran beside a transfer against the same ones alone."""
    moving = union([(t.start_s, t.end_s) for t in transfers])
    samples: dict[tuple[str, str], list[tuple[float, bool]]] = defaultdict(list)
    for event, kind in zip(kernels, kinds, strict=True):
        if kind == "compute":
            start, end = span(event)
            samples[event.name, event.args.launch_shape].append((end - start, bool(clip(moving, start, end))))
    return contention({f"{name} {shape}": values for (name, shape), values in samples.items()})
