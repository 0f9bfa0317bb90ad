"""Which stretches of a trace are steps, on the host, and the events of each by what they are."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise

import msgspec

from meshwright.record.kineto.marks import OPTIMIZER_STEP, PROFILER_STEP, STEP
from meshwright.record.kineto.trace import Event, Trace
from meshwright.record.kineto.walk import NODE

ENDLESS = float("inf")
# What categories are, in the words of several versions of Kineto; older ones began them with a capital.
DEVICE = frozenset({"kernel", "gpu_memcpy", "gpu_memset", "Kernel", "Memcpy", "Memset"})
CALLS = frozenset(
    {
        *(f"{maker}_{part}" for maker in ("cuda", "hip", "xpu", "privateuse1") for part in ("runtime", "driver")),
        "Runtime",
    }
)
OPERATORS = frozenset({"cpu_op", "Operator"})
MARKS = frozenset({"user_annotation"})


class HostStep(msgspec.Struct, frozen=True, kw_only=True):
    """A step as the host's annotations bound it; thread: the one that runs the training loop.

    led: something of the program's comes before it in the trace, so that a device's begin of it is known.
    """

    number: int
    thread: str
    begin_s: float
    end_s: float
    led: bool


class Slice:
    """A trace from the begin of one step to the begin of the next: its events that begin there, by what they are.

    Each kind is in order of begin. operators: by thread.
    """

    __slots__ = ("begin_s", "calls", "device", "marks", "operators")

    def __init__(self, trace: Trace, begin_s: float, end_s: float) -> None:
        self.begin_s = begin_s
        self.device: list[Event] = []
        self.calls: list[Event] = []
        self.marks: list[Event] = []
        self.operators: dict[str, list[Event]] = defaultdict(list)
        homes = {
            **dict.fromkeys(DEVICE, self.device.append),
            **dict.fromkeys(CALLS, self.calls.append),
            **dict.fromkeys(MARKS, self.marks.append),
        }
        operators = self.operators
        before: Event | None = None
        nested = True
        for event in trace.within(begin_s, end_s):
            start = event.start_s
            # What began earlier is in the slice before, and what begins at the end in the next.
            if start < begin_s or start >= end_s:
                continue
            category = event.category
            if category in OPERATORS:
                operators[event.thread].append(event)
                # Clocks tick slower than calls: an operator and the first one inside it may begin at one moment.
                if before is not None and before.start_s == start and before.end_s < event.end_s:
                    nested = False
                before = event
            elif home := homes.get(category):
                home(event)
        if not nested:
            for own in operators.values():
                own.sort(key=lambda e: (e.start_s, -e.end_s))


def find_steps(trace: Trace, last: int | None) -> tuple[list[HostStep], list[str]]:
    """The steps that a trace holds, in order, and what to know about how they were found.

    last: number of the last of them, where the caller knows it and the trace does not say.
    By our own annotations, or the profiler's, or from the end of one optimizer step to the end of the next, or all of
    the trace as one.
    """
    marks = trace.marks()
    own = [m for m in marks if m.name == STEP]
    profiled = [m for m in marks if m.name.startswith(PROFILER_STEP)]
    notes: list[str] = []
    if own or profiled:
        bounds = [(m.thread, m.start_s, m.end_s) for m in own or profiled]
        led = [False] + [True] * (len(bounds) - 1)
    else:
        updates = update_ends([m for m in marks if m.name.startswith(OPTIMIZER_STEP)], trace)
        bounds = [(b.thread, a.end_s, b.end_s) for a, b in pairwise(updates)]
        led = [True] * len(bounds)
        if bounds:
            notes.append(
                "The trace bounds no steps: each is taken from the end of one optimizer step to the end of the next."
            )
        elif whole := whole_trace(trace):
            bounds, led = [whole], [False]
            notes.append("The trace bounds no steps: all of it is taken as one.")
    numbers = [int(name) for m in profiled if (name := m.name.removeprefix(PROFILER_STEP)).isdigit()]
    if own or len(numbers) != len(bounds):
        first = 0 if last is None else last - len(bounds) + 1
        numbers = list(range(first, first + len(bounds)))
    steps = [
        HostStep(number=number, thread=thread, begin_s=begin, end_s=end, led=leads)
        for number, (thread, begin, end), leads in zip(numbers, bounds, led, strict=True)
    ]
    return steps, notes


def update_ends(updates: Sequence[Event], trace: Trace) -> list[Event]:
    """The last optimizer step of each training step: several optimizers may update parts of one model in turn.

    Between those of different steps lies a backward pass.
    """
    ends: list[Event] = []
    for update in updates:
        if ends and update.start_s < ends[-1].end_s:
            # One inside of another, that wraps it.
            continue
        if ends and not any(e.name.startswith(NODE) for e in trace.within(ends[-1].end_s, update.start_s)):
            ends.pop()
        ends.append(update)
    return ends


def whole_trace(trace: Trace) -> tuple[str, float, float] | None:
    """From the first operator to the last end of anything on the host, and the thread of most operators."""
    count: dict[str, int] = defaultdict(int)
    begin, end = ENDLESS, -ENDLESS
    for event in trace.within(-ENDLESS, ENDLESS):
        if event.category in OPERATORS or event.category in CALLS or event.category in MARKS:
            begin, end = min(begin, event.start_s), max(end, event.end_s)
            # Backward passes run on a thread of autograd's where there is a device.
            if event.category in OPERATORS and not event.name.startswith(NODE):
                count[event.thread] += 1
    return (max(count, key=lambda thread: count[thread]), begin, end) if count else None


def slices(trace: Trace, steps: Sequence[HostStep]) -> Iterator[Slice]:
    """The trace's slices from the first step's begin on, one a step."""
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        yield Slice(trace, step.begin_s, following.begin_s if following else ENDLESS)
