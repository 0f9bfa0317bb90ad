"""From a trace of JAX's profiler to measured steps, one list for each of the process's devices.

XLA's names say what an instruction is, not what it is for: all of compute is one bucket, with recomputing and the
optimizer's update in it, and a collective has a purpose only where the user gives it one. What is exposed of the others
is `unseen`, as is idling inside of a program, and the notes say how much it is.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import msgspec

from meshwright.account import Purpose, Transfer
from meshwright.account.intervals import Interval, intersect, length, subtract, union
from meshwright.record.detail import HostCause, StepDetail
from meshwright.record.events import Step
from meshwright.record.kineto.trace import Event, Trace
from meshwright.record.kineto.xla_detail import longest_gaps, transfer_groups, untold_note
from meshwright.record.kineto.xla_ops import DeviceWork, Op, device_work, kernel_groups, platform_of, purpose_of
from meshwright.record.timeline import Timeline, book, numbered
from meshwright.spec import SettingError

# Names of annotations (jax.profiler.TraceAnnotation) around waiting for a batch, and around a save.
INPUTS = ("input", "meshwright.input", "data", "batch", "next_batch", "get_batch", "load_batch", "data_loading")
SAVES = ("checkpoint", "meshwright.checkpoint", "save_checkpoint", "checkpointing")
# A call of a function that jax.jit made, on the thread that calls it.
CALL = "PjitFunction("
# Exposed collectives of unknown purpose below this share of the steps are not worth a note.
WORTH_SAYING = 0.01


class StepMark(msgspec.Struct, frozen=True, kw_only=True):
    """A step on the host. bounded: whether it begins where the host says so, and not where the one before it ends."""

    number: int
    start_s: float
    end_s: float
    bounded: bool


class HostSide(msgspec.Struct, frozen=True, kw_only=True):
    """What the host did: on its thread that marks steps or calls programs."""

    inputs: list[Interval]
    saves: list[Interval]
    calls: list[Interval]
    events: list[Event]


class XlaSteps(msgspec.Struct, frozen=True, kw_only=True):
    """Steps by device, each device's in order, and what a reader must know about them.

    platform: what the devices are. collectives: by which a purpose can be given, instructions and their kinds.
    """

    devices: dict[int, list[Step]]
    platform: str
    collectives: frozenset[str]
    notes: tuple[str, ...]


def measure_xla_trace(
    trace: Trace,
    *,
    purposes: Mapping[str, Purpose] | None = None,
    inputs: Collection[str] = INPUTS,
    useful_s: float = 0.0,
    first_rank: int = 0,
) -> XlaSteps:
    """Every step of the trace that can be bounded, as each device saw it.

    Steps are those that jax.profiler.StepTraceAnnotation numbers; without it, one call each of the function whose
    program took most of the devices' time; else the whole trace is one. The first of several is left out: where it
    began on the device is not in the trace.

    purposes: of collectives, by instruction ("all-reduce.3") or kind ("all-gather"). inputs: names of annotations
    around waiting for a batch. useful_s: a device's model FLOPs of a step over its peak; 0: not known. first_rank: the
    rank that device 0 is counted as.
    Raises SettingError where the trace shows nothing that any device did.
    """
    events = trace.within(float("-inf"), float("inf"))
    work = device_work(events)
    if not work:
        nearest = "jax.profiler.trace(folder) around some steps"
        raise SettingError(str(trace.path), "shows nothing that a device did", nearest)
    notes: list[str] = []
    marks = step_marks(events, work, notes)
    host = host_side(events, inputs)
    devices: dict[int, list[Step]] = {}
    untold: dict[str, float] = defaultdict(float)
    for device, done in work.items():
        told = Told(path=str(trace.path), rank=first_rank + device, useful_s=useful_s)
        bounded = windows(marks, done.ops)
        devices[device] = [
            measure_step(number, window, done, host, purposes or {}, untold, told)
            for number, window in (bounded[1:] or bounded)
        ]
    whole_s = sum(step.measured.wall_s for found in devices.values() for step in found)
    if sum(untold.values()) > WORTH_SAYING * whole_s:
        notes.append(untold_note(untold, whole_s))
    if not host.inputs:
        notes.append(
            "No annotation of the trace is around waiting for a batch, so that such waiting counts as `host`: "
            'jax.profiler.TraceAnnotation("input") around it tells them apart.'
        )
    collectives = frozenset(name for done in work.values() for op in done.ops if op.kind for name in (op.name, op.kind))
    return XlaSteps(devices=devices, platform=platform_of(events), collectives=collectives, notes=tuple(notes))


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """What stands beside a device's events: the trace's file, the device's rank, its useful seconds."""

    path: str
    rank: int
    useful_s: float


def step_marks(events: Sequence[Event], work: Mapping[int, DeviceWork], notes: list[str]) -> list[StepMark]:
    """Steps as the host marks them, or as it calls them; else one, and a note."""
    numbered_ = {e.args.step: e for e in reversed(events) if e.args.step >= 0 and e.process.startswith("/host:")}
    marks = sorted(numbered_.items(), key=lambda item: item[1].start_s)
    if marks:
        return [StepMark(number=n, start_s=e.start_s, end_s=e.end_s, bounded=True) for n, e in marks]
    seconds: dict[str, float] = defaultdict(float)
    for done in work.values():
        for op in done.ops:
            seconds[op.program[0]] += op.end_s - op.start_s
    main = max(seconds, key=lambda module: seconds[module])
    name = f"{CALL}{main.removeprefix('jit_')})"
    # A call that goes through Python shows as two, one in the other.
    calls = union((e.start_s, e.end_s) for e in events if e.name == name)
    if not calls:
        notes.append("The trace marks no steps (jax.profiler.StepTraceAnnotation), so all of it counts as one.")
        first = min(op.launch_s for done in work.values() for op in done.ops)
        return [StepMark(number=0, start_s=first, end_s=float("inf"), bounded=False)]
    notes.append(
        f"The trace marks no steps (jax.profiler.StepTraceAnnotation), so each call of {name[len(CALL) : -1]} counts "
        "as one."
    )
    begins = [calls[0][0], *(end for _, end in calls[:-1])]
    return [
        StepMark(number=number, start_s=begin, end_s=end, bounded=False)
        for number, (begin, (_, end)) in enumerate(zip(begins, calls, strict=True))
    ]


def windows(marks: Sequence[StepMark], ops: Sequence[Op]) -> list[tuple[int, Interval]]:
    """Each step's number and stretch on a device: from the end of what was launched before it to the end of what was
    launched in it; from the host's begin of it, or to the host's end, where these are later."""
    ordered = sorted(ops, key=lambda op: op.launch_s)
    launched = [op.launch_s for op in ordered]
    found: list[tuple[int, Interval]] = []
    before_s, position = float("-inf"), 0
    for mark in marks:
        first, last = bisect_left(launched, mark.start_s), bisect_left(launched, mark.end_s)
        before_s = max((op.end_s for op in ordered[position:first]), default=before_s)
        position = max(position, last)
        if first == last:
            continue
        end_s = max(op.end_s for op in ordered[first:last])
        start_s = max(before_s, mark.start_s) if mark.bounded or before_s == float("-inf") else before_s
        before_s = max(before_s, end_s)
        end_s = max(end_s, mark.end_s) if mark.bounded else end_s
        if start_s < end_s:
            found.append((mark.number, (start_s, end_s)))
    return found


def host_side(events: Sequence[Event], inputs: Collection[str]) -> HostSide:
    """What the thread did that trains: the one with the steps' annotations or the calls of programs."""
    names = {name.lower() for name in inputs}
    on_host = [e for e in events if e.process.startswith("/host:") and not e.args.hlo]
    threads = [e.thread for e in on_host if e.args.step >= 0 or e.name.startswith(CALL)]
    main = max(set(threads), key=threads.count, default="")
    mine = [e for e in on_host if e.thread == main and e.args.step < 0]

    def named(wanted: Collection[str]) -> list[Interval]:
        return union((e.start_s, e.end_s) for e in mine if e.name.lower().replace(" ", "_") in wanted)

    calls = union((e.start_s, e.end_s) for e in mine if e.name.startswith(CALL))
    return HostSide(inputs=named(names), saves=named(SAVES), calls=calls, events=mine)


def measure_step(
    number: int,
    window: Interval,
    done: DeviceWork,
    host: HostSide,
    purposes: Mapping[str, Purpose],
    untold: dict[str, float],
    told: Told,
) -> Step:
    """One step of one device; exposed collectives that nobody gave a purpose are added to `untold` by kind."""
    start, end = window
    ops = [op for op in done.ops if op.start_s < end and op.end_s > start]
    computing = union((op.start_s, op.end_s) for op in ops if not op.kind)
    collectives = [op for op in ops if op.kind]
    transfers = numbered(
        [
            # Who takes part a trace does not say, so that nobody's waiting is told from the transfer itself.
            Transfer(purpose=purpose, ranks=(told.rank,), index=0, start_s=op.start_s, end_s=op.end_s)
            for op in collectives
            if (purpose := purpose_of(op, purposes)) is not None
        ]
    )
    moving = union((one.start_s, one.end_s) for one in transfers)
    unnamed = [op for op in collectives if purpose_of(op, purposes) is None]
    nameless = union((op.start_s, op.end_s) for op in unnamed)
    running = union([*done.programs, *nameless])
    unseen = subtract(subtract(intersect([window], running), computing), moving)
    idle = subtract(subtract(subtract([window], running), computing), moving)
    for kind in {op.kind for op in unnamed}:
        during = intersect([window], union((op.start_s, op.end_s) for op in unnamed if op.kind == kind))
        untold[kind] += length(subtract(during, computing))
    stalled, waiting = intersect(idle, host.saves), intersect(idle, host.inputs)
    late = subtract(idle, union([*stalled, *waiting]))
    timeline = Timeline(
        start_s=start,
        end_s=end,
        busy={"compute": computing},
        waits={"unseen": unseen, "checkpoint": stalled, "input": waiting, "host": late},
        transfers=transfers,
        contention_s=0.0,
    )
    measured = book(timeline, step=number, rank=told.rank, host=told.path, useful_s=told.useful_s)
    launching = length(intersect(late, host.calls))
    causes: dict[HostCause, float] = {"launch": launching, "python": length(late) - launching}
    buckets = {"unseen": unseen, "checkpoint": stalled, "input": waiting, "host": late}
    computes = [op for op in ops if not op.kind]
    detail = StepDetail(
        kernels=kernel_groups(ops),
        groups=tuple(transfer_groups(transfers, computing, window)),
        gaps=tuple(longest_gaps(buckets, ops, host.events, start)),
        host={cause: seconds for cause, seconds in causes.items() if seconds > 0},
        launches=len(ops),
        kernel_s=sum(op.end_s - op.start_s for op in computes) / len(computes) if computes else 0.0,
    )
    return Step(measured=measured, detail=detail)
