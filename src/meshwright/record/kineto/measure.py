"""Each step of a trace as an account, with what the trace tells beside it."""

from collections import deque
from collections.abc import Mapping, Sequence

import msgspec

from meshwright.account import MeasuredStep, Purpose
from meshwright.account.intervals import Interval, subtract
from meshwright.record.detail import GroupTransfers, StepDetail
from meshwright.record.events import Step
from meshwright.record.kineto.cpu import CpuStep, cpu_step
from meshwright.record.kineto.gpu import DeviceStep, GpuStep, device_step, gpu_step
from meshwright.record.kineto.idle import host_causes, host_work, idle_gaps
from meshwright.record.kineto.kernels import group_kernels, own_seconds
from meshwright.record.kineto.marks import expert_rows, span
from meshwright.record.kineto.phases import Phases, phases_of
from meshwright.record.kineto.purposes import Sent
from meshwright.record.kineto.steps import DEVICE, ENDLESS, HostStep, Slice, find_steps
from meshwright.record.kineto.trace import Event, Trace
from meshwright.record.kineto.walk import Walk
from meshwright.record.timeline import Timeline, book

# Slices that are kept: a step's, the one before, and one that is made.
KEPT = 3

# The ranks of a host share a clock, whose seconds since the epoch leave a float too few places for a step's. So they
# are counted from the last whole number of these, 12 days.
CLOCK_S = float(2**20)

NOT_FOUND = "The trace holds no step: neither annotations of steps nor operators."
NO_KERNELS = "The trace holds no kernels of step {}."
COMPILED = "Backward passes were compiled: what they compute again for activation checkpointing is part of compute."
TWICE = "Gradients of gradients are taken: what a backward pass computes again beside them is part of compute."
NO_LEAD = "The trace holds one step alone, so that what the device still had to do before it counts as its own."


def clock_s(trace: Trace) -> float:
    """What measured steps' times are later by than the trace's own."""
    return trace.base_s % CLOCK_S


def measure_trace(
    trace: Trace,
    *,
    purposes: Mapping[str, Purpose] | None = None,
    useful_s: float = 0.0,
    rank: int | None = None,
    host: str | None = None,
    last: int | None = None,
    only_last: bool = False,
) -> tuple[list[Step], list[str]]:
    """The steps of a rank's trace, in order, and notes on what could not be seen.

    purposes: of process groups that somebody knows, by description or name. useful_s: a step's model FLOPs on this rank
    over the device's peak, seconds (0 where unknown). rank, host: as the trace says where they are None. last: number
    of the last step, where the trace does not say. A GPU's first step, whose begin on the device is not in the trace,
    is left out where there are others.
    """
    found, notes = find_steps(trace, last)
    if not found:
        return [], [*notes, NOT_FOUND]
    reader = Reader(trace, found, purposes or {}, trace.rank if rank is None else rank)
    on_gpu = bool(reader.device(0, 0)) or bool(trace.within(-ENDLESS, ENDLESS, DEVICE))
    wanted = range(len(found)) if not on_gpu or len(found) == 1 else [i for i, s in enumerate(found) if s.led]
    if on_gpu and len(found) == 1 and not found[0].led:
        notes.append(NO_LEAD)
    steps: list[Step] = []
    for at in wanted[-1:] if only_last else wanted:
        made = reader.on_gpu(at) if on_gpu else reader.on_cpu(at)
        if made is None:
            notes.append(NO_KERNELS.format(found[at].number))
            continue
        timeline, detail, rows = made
        measured = book(
            timeline,
            step=found[at].number,
            rank=max(0, trace.rank) if rank is None else rank,
            host=trace.host if host is None else host,
            useful_s=useful_s,
        )
        detail = msgspec.structs.replace(detail, groups=group_transfers(reader.sent, measured))
        measured = msgspec.structs.replace(measured, expert_rows=rows)
        steps.append(Step(measured=later(measured, clock_s(trace)), detail=detail))
    return steps, [*notes, *sorted(reader.notes)]


class Reader:
    """A trace on its way to steps: its slices are made as they are needed and let go."""

    def __init__(self, trace: Trace, steps: Sequence[HostStep], named: Mapping[str, Purpose], rank: int) -> None:
        self.trace, self.steps, self.named, self.rank = trace, steps, named, rank
        self.notes: set[str] = set()
        self.sent: list[Sent] = []
        self._slices: deque[tuple[int, Slice, Walk]] = deque(maxlen=KEPT)

    def slice(self, at: int) -> tuple[Slice, Walk]:
        """The events that begin in a step, and the walk over its operators."""
        for number, events, walk in self._slices:
            if number == at:
                return events, walk
        following = self.steps[at + 1].begin_s if at + 1 < len(self.steps) else ENDLESS
        events = Slice(self.trace, self.steps[at].begin_s, following)
        walk = Walk(events.operators)
        self._slices.append((at, events, walk))
        return events, walk

    def device(self, at: int, ahead: int) -> list[Event]:
        """Device events from a step's begin on the host until `ahead` steps later, and whether that is all of them."""
        behind = at + 1 + ahead
        until = self.steps[behind].begin_s if behind < len(self.steps) else ENDLESS
        return list(self.trace.within(self.steps[at].begin_s, until, DEVICE))

    def on_gpu(self, at: int) -> tuple[Timeline, StepDetail, tuple[int, ...]] | None:
        """A step of a program that has a device."""
        step = self.steps[at]
        around = [self.slice(number) for number in range(max(0, at - 1), at + 1)]
        launches = {c.args.correlation: c for events, _ in around for c in events.calls if c.args.correlation >= 0}
        if at == 0 and step.led:
            # What was launched before the first step that is known.
            before = self.trace.within(-ENDLESS, step.begin_s)
            launches |= {e.args.correlation: e for e in before if e.args.correlation >= 0 and e.category not in DEVICE}
        on_device = self.reach(at, step, launches)
        if on_device is None:
            return None
        events, walk = around[-1]
        phases = phases_of(events.marks, walk, step)
        self.note(walk, phases)
        made = gpu_step(step, on_device, events, walk, phases, self.trace.groups, self.named, self.rank)
        self.sent = made.sent
        slices, walks = [events for events, _ in around], [walk for _, walk in around]
        return made.timeline, device_detail(made, on_device, slices, walks), expert_rows(events.marks, phases.during)

    def reach(self, at: int, step: HostStep, launches: Mapping[int, Event]) -> DeviceStep | None:
        """The step on the device, looked for as far as the host was ahead of it."""
        ahead = 1
        while True:
            device = self.device(at, ahead)
            found = device_step(step, device, launches)
            done = at + 1 + ahead >= len(self.steps)
            late = device and launches.get(device[-1].args.correlation, device[-1]).start_s <= step.end_s
            if done or not late:
                return found
            ahead *= 2

    def on_cpu(self, at: int) -> tuple[Timeline, StepDetail, tuple[int, ...]]:
        """A step of a program whose process is its own device."""
        step = self.steps[at]
        events, walk = self.slice(at)
        phases = phases_of(events.marks, walk, step)
        self.note(walk, phases)
        made = cpu_step(step, events, walk, phases, self.trace.groups, self.named)
        self.sent = made.sent
        return made.timeline, process_detail(made, events, walk, phases), expert_rows(events.marks, phases.during)

    def note(self, walk: Walk, phases: Phases) -> None:
        """What this step did not show."""
        if walk.compiled and not phases.during["recompute"]:
            self.notes.add(COMPILED)
        if walk.twice:
            self.notes.add(TWICE)


def device_detail(made: GpuStep, on_device: DeviceStep, slices: Sequence[Slice], walks: Sequence[Walk]) -> StepDetail:
    """What a GPU's step tells beside its account, but for its process groups."""
    begin_s, end_s = on_device.begin_s, on_device.end_s
    names = walks[-1].names
    kernels = group_kernels(
        (e.name, names.get(e.args.external, ""), kind == "optimizer", e.end_s - e.start_s)
        for e, kind in zip(made.kernels, made.kinds, strict=True)
    )
    computing = [e.end_s - e.start_s for e, kind in zip(made.kernels, made.kinds, strict=True) if kind == "compute"]
    waits = {name: made.timeline.waits[name] for name in ("input", "checkpoint", "host")}
    busy = [interval for own in made.timeline.busy.values() for interval in own]
    stalled = sorted([*waits["input"], *waits["checkpoint"]])
    late = subtract(subtract(waits["host"], sorted(busy)), stalled)
    return StepDetail(
        kernels=kernels,
        gaps=idle_gaps(begin_s, end_s, on_device.inside, {**waits, "host": late}, slices),
        host=host_causes(late, host_work(slices, walks, min(begin_s, slices[-1].begin_s), end_s)),
        launches=len(made.kernels),
        kernel_s=sum(computing) / len(computing) if computing else 0.0,
    )


def process_detail(made: CpuStep, events: Slice, walk: Walk, phases: Phases) -> StepDetail:
    """What a CPU's step tells beside its account, but for its process groups."""
    timeline = made.timeline
    spans = [span(e) for e in made.operators]
    seconds = own_seconds(spans)
    kernels = group_kernels(
        (e.name, "", any(s <= e.start_s <= t for s, t in phases.during["optimizer"]), own)
        for e, own in zip(made.operators, seconds, strict=True)
    )
    taken = [interval for own in timeline.busy.values() for interval in own]
    stalled = [*timeline.waits["input"], *timeline.waits["checkpoint"]]
    late = subtract(subtract(timeline.waits["host"], sorted(taken)), sorted(stalled))
    work = host_work([events], [walk], timeline.start_s, timeline.end_s)
    busy = [e for e in made.operators if e.start_s < timeline.end_s]
    sent: dict[str, list[Interval]] = {}
    for transfer in timeline.transfers:
        sent.setdefault(f"comm.{transfer.purpose}", []).append((transfer.start_s, transfer.end_s))
    return StepDetail(
        kernels=kernels,
        # Transfers are no operators: between these they are what a process waits for.
        gaps=idle_gaps(timeline.start_s, timeline.end_s, busy, {**timeline.waits, "host": late, **sent}, [events]),
        host=host_causes(late, msgspec.structs.replace(work, waits=[])),
        launches=len(made.operators),
        kernel_s=sum(seconds) / len(seconds) if seconds else 0.0,
    )


def later(measured: MeasuredStep, seconds: float) -> MeasuredStep:
    """The same step, told by a clock that is ahead by so much."""
    transfers = [
        msgspec.structs.replace(
            t,
            start_s=t.start_s + seconds,
            end_s=t.end_s + seconds,
            exposed=tuple((begin + seconds, end + seconds) for begin, end in t.exposed),
        )
        for t in measured.transfers
    ]
    begin_s, end_s = measured.start_s + seconds, measured.end_s + seconds
    return msgspec.structs.replace(measured, start_s=begin_s, end_s=end_s, transfers=tuple(transfers))


def group_transfers(sent: Sequence[Sent], measured: MeasuredStep) -> tuple[GroupTransfers, ...]:
    """What each process group carried for each purpose, most exposed first. sent: as the step's transfers."""
    tables: dict[tuple[str, tuple[int, ...], Purpose], list[float]] = {}
    known: dict[tuple[str, tuple[int, ...], Purpose], bool] = {}
    # Messages between stages of our own follow the collectives.
    for one, transfer in zip(sent, measured.transfers, strict=False):
        key = (one.description or one.group, transfer.ranks, transfer.purpose)
        row = tables.setdefault(key, [0.0] * 4)
        exposed = transfer.exposed_s()
        known[key] = known.get(key, True) and one.sent_bytes is not None
        for column, more in enumerate((1, one.sent_bytes or 0.0, exposed, transfer.end_s - transfer.start_s - exposed)):
            row[column] += more
    found = [
        GroupTransfers(
            group=group,
            ranks=ranks,
            purpose=purpose,
            count=round(count),
            sent_bytes=sent_bytes if known[group, ranks, purpose] else None,
            exposed_s=exposed_s,
            overlapped_s=overlapped_s,
        )
        for (group, ranks, purpose), (count, sent_bytes, exposed_s, overlapped_s) in tables.items()
    ]
    return tuple(sorted(found, key=lambda group: -group.exposed_s))
