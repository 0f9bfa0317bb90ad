"""What XLA's profiler shows of devices: which instruction ran where, in which execution of which program."""

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence

import msgspec

from meshwright.account import Purpose
from meshwright.account.intervals import Interval
from meshwright.record.detail import KernelGroup
from meshwright.record.kineto.kernels import purpose_groups
from meshwright.record.kineto.trace import Event

DEVICE = re.compile(r"/device:(\w+):(\d+)")
# Names of XLA's instructions, ended by -start and -done where the transfer goes on between the two.
COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|ragged-all-to-all|all-to-all|collective-permute|collective-broadcast"
    r"|async-collective|send|recv)(?![a-z])"
)
# NCCL's and RCCL's kernels, where the instruction is not named.
NCCL = re.compile(r"(?:nccl|rccl).*?(AllReduce|AllGather|ReduceScatter|AllToAll|SendRecv|Broadcast)", re.IGNORECASE)
NCCL_KINDS = {
    "allreduce": "all-reduce",
    "allgather": "all-gather",
    "reducescatter": "reduce-scatter",
    "alltoall": "all-to-all",
    "sendrecv": "collective-permute",
    "broadcast": "collective-broadcast",
}
# Instructions that hold others, which have events of their own.
CONTAINERS = ("while", "conditional", "call")
# What kernels are for, by the first of these that is in the names of kernel and instruction.
KERNELS: tuple[tuple[str, str], ...] = (
    ("attention", r"attention|fmha|flash"),
    ("matrix products", r"dot|gemm|conv(?!ert)|cublas|cutlass|nvjet|cudnn|hipblas|ynn_fusion|xmma"),
    ("copies", r"^(?:copy|transpose|bitcast|concatenate|dynamic|slice|memcpy|memset)(?!\w*_fusion)|memcpy|memset"),
    ("fused and other", r""),
)


class Op(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """An instruction's run on a device. launch_s: when the host launched it or its program. kind: of a collective, ""
    of all others. program: its module and the number of the execution, or as much of these as the trace says."""

    name: str
    kernel: str
    kind: str
    start_s: float
    end_s: float
    launch_s: float
    program: tuple[str, int]


class DeviceWork(msgspec.Struct, frozen=True, kw_only=True):
    """All that a trace shows of one device, in order of time. programs: stretches in which it executed a program."""

    ops: tuple[Op, ...]
    programs: tuple[Interval, ...]


def device_work(events: Sequence[Event]) -> dict[int, DeviceWork]:
    """The devices of a trace by their numbers."""
    launched, runs = launches(events)
    streams = {(e.process, e.thread) for e in events if e.thread.startswith("Stream")}
    streamed = {process for process, _ in streams}
    ops: dict[int, list[Op]] = defaultdict(list)
    programs: dict[int, list[Interval]] = defaultdict(list)
    # Instructions of a device's own lines do not say which execution they are of; these say when each one was.
    executions: dict[int, list[tuple[float, float, int]]] = defaultdict(list)
    for event in events:
        device = device_of(event)
        if device is None or event.end_s <= event.start_s:
            continue
        on_line = event.process.startswith("/device:")
        if on_line and event.thread.startswith("XLA Modules"):
            programs[device].append((event.start_s, event.end_s))
            executions[device].append((event.start_s, event.end_s, event.args.run))
        # Lines that are derived from the streams say the same again.
        elif on_line and not (
            (event.process, event.thread) in streams or (event.process not in streamed and "XLA Ops" in event.thread)
        ):
            continue
        elif not on_line and not event.args.hlo:
            if event.args.run != -1:
                programs[device].append((event.start_s, event.end_s))
        elif base_name(event.args.hlo or event.name) not in CONTAINERS:
            launch_s = launched.get(event.args.correlation, runs.get(event.args.run, event.start_s))
            ops[device].append(op_of(event, min(launch_s, event.start_s)))
    work: dict[int, DeviceWork] = {}
    for device, found in sorted(ops.items()):
        placed = in_executions(sorted(found, key=lambda op: op.start_s), sorted(executions[device]), runs)
        work[device] = DeviceWork(ops=tuple(placed), programs=extents(placed, programs[device]))
    return work


def in_executions(
    ops: Sequence[Op], executions: Sequence[tuple[float, float, int]], runs: Mapping[int, float]
) -> list[Op]:
    """The same, those that lie in an execution launched with it, where nothing else said when they were launched."""
    found: list[Op] = []
    for op in ops:
        position = bisect_right(executions, op.start_s, key=lambda one: one[0]) - 1
        inside = position >= 0 and op.start_s < executions[position][1]
        launched_s = runs.get(executions[position][2]) if inside else None
        if op.launch_s < op.start_s or launched_s is None:
            found.append(op)
        else:
            program = (op.program[0], executions[position][2])
            found.append(msgspec.structs.replace(op, launch_s=min(launched_s, op.start_s), program=program))
    return found


def device_of(event: Event) -> int | None:
    """The device that an event ran on: by its process's name, or on a CPU, whose devices share one, by its argument."""
    if match := DEVICE.match(event.process):
        return int(match[2])
    if event.args.device >= 0:
        return event.args.device
    return 0 if event.args.hlo else None


def platform_of(events: Sequence[Event]) -> str:
    """What the devices are, as XLA calls them: GPU, TPU; those of a CPU have no processes of their own."""
    found = next((match[1] for event in events if (match := DEVICE.match(event.process))), "CPU")
    return f"{found} device"


def launches(events: Sequence[Event]) -> tuple[dict[int, float], dict[int, float]]:
    """When the host launched what, by correlation of a kernel and by number of an execution."""
    kernels: dict[int, float] = {}
    runs: dict[int, float] = {}
    for event in events:
        if event.process.startswith("/device:") or event.args.hlo:
            continue
        if event.args.correlation != -1:
            kernels.setdefault(event.args.correlation, event.start_s)
        if event.args.run != -1 and event.args.device < 0:
            runs.setdefault(event.args.run, event.start_s)
    return kernels, runs


def op_of(event: Event, launch_s: float) -> Op:
    """An event of a device's line, or of a CPU device."""
    name = event.args.hlo or event.name
    return Op(
        name=name,
        kernel=event.name,
        kind=collective_kind(name, event.name),
        start_s=event.start_s,
        end_s=event.end_s,
        launch_s=launch_s,
        program=(event.args.module, event.args.run),
    )


def base_name(name: str) -> str:
    """An instruction's name without its number: "all-reduce.3" is "all-reduce"."""
    return name.partition(".")[0]


def collective_kind(name: str, kernel: str) -> str:
    """Which collective an instruction or a kernel is; "" where it is none."""
    if match := COLLECTIVE.match(name):
        return match[1]
    match = NCCL.search(kernel)
    return NCCL_KINDS[match[1].lower()] if match else ""


def purpose_of(op: Op, purposes: Mapping[str, Purpose]) -> Purpose | None:
    """What a collective is for, as the user said of this instruction, else of its kind. Its name does not tell."""
    return purposes[op.name] if op.name in purposes else purposes.get(op.kind)


def extents(ops: Sequence[Op], programs: Sequence[Interval]) -> tuple[Interval, ...]:
    """When the device executed programs: as the trace says, and from the first to the last instruction of each
    execution; where executions have no numbers, of each run of instructions of one launch."""
    found: dict[tuple[str, int, float], Interval] = {}
    for op in ops:
        module, run = op.program
        if not module:
            continue
        key = (module, run, op.launch_s if run == -1 else 0.0)
        start, end = found.get(key, (op.start_s, op.end_s))
        found[key] = (min(start, op.start_s), max(end, op.end_s))
    return tuple(sorted([*programs, *found.values()]))


def kernel_groups(ops: Sequence[Op]) -> tuple[KernelGroup, ...]:
    """Instructions by what they are for, the longest first."""
    seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    count: dict[str, int] = defaultdict(int)
    for op in ops:
        purpose = "communication" if op.kind else kernel_purpose(op)
        seconds[purpose][op.kernel] += op.end_s - op.start_s
        count[purpose] += 1
    return purpose_groups(seconds, count)


def kernel_purpose(op: Op) -> str:
    """What a kernel that computes is for, as far as its names tell: XLA fuses what stands together."""
    names = f"{op.name} {op.kernel}"
    return next(purpose for purpose, pattern in KERNELS if re.search(pattern, names, re.IGNORECASE))
