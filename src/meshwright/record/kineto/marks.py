"""The annotations that readers of a trace know: our own, and those that PyTorch and its libraries put there."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from meshwright.account.intervals import Interval
from meshwright.record.kineto.trace import Event

# Annotations that a training loop may put around its phases, recompute around what a backward pass runs again,
# attention around its transfers along context, and experts around theirs; STEP around the whole step.
PREFIX = "meshwright."
STEP = f"{PREFIX}step"
PHASES = ("input", "forward", "backward", "recompute", "context", "expert", "optimizer", "control", "checkpoint")
# Around Python's collection of garbage.
COLLECT = f"{PREFIX}collect"
# A mark that ends in the number of rows that a rank's experts were sent.
ROWS = f"{PREFIX}rows."
# A mark that ends in the CPU time of the training thread in the step that it closes, microseconds.
CPU_TIME = f"{PREFIX}cpu "

# What torch.profiler, torch.optim and torch.utils.data annotate by themselves.
PROFILER_STEP = "ProfilerStep#"
OPTIMIZER_STEP = "Optimizer.step#"
OPTIMIZER = (OPTIMIZER_STEP, "Optimizer.zero_grad#")
LOADER = "enumerate("
# FSDP's stretches, and those of them that hold the model's own work too.
SHARDING = ("FSDP::", "FullyShardedDataParallel.")
WRAPPING = ("FullyShardedDataParallel.forward", "DistributedDataParallel.forward")
REDUCER = "torch.distributed.ddp.reducer::"

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


def message_spans(marks: Sequence[Event]) -> list[MessageSpan]:
    """All of them, in order of time."""
    found: list[MessageSpan] = []
    for mark in marks:
        if mark.name.startswith(PREFIX):
            what, *numbers = mark.name.removeprefix(PREFIX).split(" ")
            if what in MESSAGES and len(numbers) == 3:
                source, target, number = map(int, numbers)
                found.append(MessageSpan(what, source, target, number, span(mark)))
    return sorted(found, key=lambda message: message.interval)


def span(event: Event) -> Interval:
    """Start and end of an event, seconds."""
    return event.start_s, event.end_s


def within(moment: float, intervals: Sequence[Interval]) -> bool:
    """Whether a moment lies in one of some sorted, disjoint intervals."""
    position = bisect_right(intervals, (moment, float("inf"))) - 1
    return position >= 0 and moment <= intervals[position][1]


def expert_rows(marks: Sequence[Event], during: Mapping[str, Sequence[Interval]]) -> tuple[int, ...]:
    """Rows that the rank's experts were sent, forward pass by forward pass, of a step's marks in order of time.

    What recompute marks once more is left out.
    """
    told = [mark for mark in marks if mark.name.startswith(ROWS)]
    return tuple(int(m.name.removeprefix(ROWS)) for m in told if not within(m.start_s, during["recompute"]))


def cpu_seconds(marks: Sequence[Event]) -> float | None:
    """CPU time of the training thread, where the step says it."""
    told = [mark.name.removeprefix(CPU_TIME) for mark in marks if mark.name.startswith(CPU_TIME)]
    return float(told[-1]) * 1e-6 if told else None
