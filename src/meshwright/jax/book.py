"""The thread that waits for results, so that the training loop never does, and writes down what it learns of them."""

import socket
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, NamedTuple

import jax

from meshwright.account.intervals import Interval, intersect, length, union
from meshwright.jax.account import Call, Lap, measure_lap
from meshwright.jax.compiling import Compiled
from meshwright.jax.program import with_flops
from meshwright.jax.watch import Called, wait_for
from meshwright.record import Ended, Fault, LineWriter, Metrics, Program, RunFolder, Span, write_program
from meshwright.record.process import peak_resident_bytes

# Steps share a span until this many seconds have passed, so that a long run stays a short file.
FLUSH_S = 10.0
# Steps of an attempt that are not accounted, and in which functions may be compiled twice: the second call of a step
# often has arguments that are laid out otherwise than the first one's.
WARM_STEPS = 3
# Every step is waited for where that is within the budget, else one in so many and the one before it; one in ten is
# accounted at most. Each divides the next, so that processes that choose differently have steps in common.
STRIDES = (1, 10, 100, 1000)
# Steps after which the cost of waiting is looked at.
REVIEWED = 20
# The share of a stretch by which its ends may be off.
UNSURE = 0.05
# Lines about recompiling before they would fill the file.
MOST_FAULTS = 20


class Boundary(NamedTuple):
    """The loop's thread is done with a step. spent_s: what recording took of its time."""

    begin_s: float
    end_s: float
    inputs: tuple[Interval, ...]
    collected: tuple[Interval, ...]
    told: "Told"
    spent_s: float


class Told(NamedTuple):
    """What the loop says of a step, some of it as arrays that are still being computed."""

    loss: Any = None
    gradient_norm: Any = None
    learning_rate: Any = None
    tokens: Any = None


class Outside(NamedTuple):
    """A stretch outside of steps has ended; all programs called before it were waited for."""

    name: str
    start_s: float
    end_s: float


class Noted(NamedTuple):
    """Something went wrong."""

    what: str


class Drain(NamedTuple):
    """All that was asked for before is done when `reached` is set. how: the end in a word, "" where it has none."""

    reached: threading.Event
    close: bool = False
    how: str = ""


Message = Called | Boundary | Compiled | Outside | Noted | Drain


class Book:
    """One process's record of one attempt. Messages come in the order in which the loop's thread sent them."""

    def __init__(
        self,
        folder: RunFolder,
        attempt: int,
        program: Program,
        *,
        rank: int,
        began_s: float,
        budget: float,
        first_step: int,
    ) -> None:
        self.send: Callable[[Message], None]
        self._queue: SimpleQueue[Message] = SimpleQueue()
        self.send = self._queue.put
        self._folder, self._attempt, self._program = folder, attempt, program
        self._rank, self._host = rank, socket.gethostname()
        self._began_s, self._budget = began_s, budget
        # The monotonic clock's zero in the epoch's seconds: an adjusted clock must not tear a step.
        self._epoch_s = time.time() - time.perf_counter()
        self._writer = LineWriter(folder.events(attempt, rank))
        self._metrics = LineWriter(folder.metrics) if rank == 0 else None
        # Of the step that is under way.
        self._first = self._step = first_step
        self._called: list[Called] = []
        self._calls: list[Call] = []
        # Results that nobody has waited for yet: the last ones alone, so that memory is not held.
        self._loose: tuple[jax.Array, ...] = ()
        self._compiling: list[Interval] = []
        # What was no step's since the last one that was booked: compiling, and stretches outside of steps.
        self._apart: list[Interval] = []
        # Of what was done before: when (and how long before that it may have been), and after which step.
        self._since: tuple[float, float, int] | None = None
        self._stretch: tuple[float, int] | None = None
        self._end_s = began_s
        # How often each function was compiled.
        self._compiled: dict[str, int] = {}
        self._faults = 0
        self._stride = STRIDES[0]
        self._spent: list[float] = []
        self._reviewed: tuple[float, float] | None = None
        self._memory_bytes: float | None = None
        threading.Thread(target=self._run, name="meshwright", daemon=True).start()

    def _run(self) -> None:
        while True:
            message = self._queue.get()
            try:
                self._take(message)
            # Nothing that goes wrong in recording may reach the program that is recorded.
            except Exception as error:
                self._fault(f"recording step {self._step}: {type(error).__name__}: {error}")
            if isinstance(message, Drain):
                message.reached.set()
                if message.close:
                    return

    def _take(self, message: Message) -> None:
        match message:
            case Called():
                self._wait(message)
            case Boundary():
                self._end_step(message)
            case Compiled():
                self._note_compiling(message)
            case Outside():
                self._flush_compiling()
                self._flush_steps()
                self._apart.append((message.start_s, message.end_s))
                self._span(message.name, message.start_s, message.end_s, step=self._step)
            case Noted():
                self._fault(message.what)
            case Drain():
                self._drain(message)

    # --- Programs and steps ----------------------------------------------------------------------------------------

    def _is_warm(self) -> bool:
        return self._step >= self._first + WARM_STEPS

    def _is_waited_for(self, step: int) -> bool:
        return step % self._stride == 0 or (step + 1) % self._stride == 0

    def _wait(self, called: Called) -> None:
        came_s = time.perf_counter()
        there = wait_for(called.outputs) if self._is_waited_for(self._step) else None
        done_s = time.perf_counter() if there is not None else None
        # What was there when this thread came to it may have been there since the call came back, or even before.
        late_s = came_s - called.exit_s if there else 0.0
        self._calls.append(Call(function=called.function, entry_s=called.entry_s, done_s=done_s, late_s=late_s))
        self._called.append(called._replace(outputs=()))
        self._loose = () if there is not None else called.outputs

    def _end_step(self, boundary: Boundary) -> None:
        lap = Lap(
            step=self._step,
            begin_s=boundary.begin_s,
            end_s=boundary.end_s,
            inputs=boundary.inputs,
            collected=boundary.collected,
            calls=tuple(self._calls),
        )
        if lap.step == self._first:
            self._span("startup", self._began_s, lap.begin_s)
        if lap.step == self._first + 1:
            # Not of the first step: it may call what no other does.
            self._count_flops()
        if lap.step == self._first + WARM_STEPS and not lap.calls:
            self._fault("no program of the step is watched, so its parts are not known: recorder.watch(train_step)")
        done_s = lap.done_s
        if done_s is not None:
            self._book(lap, done_s, boundary.told)
        self._end_s = lap.end_s if done_s is None else done_s
        self._flush_compiling()
        self._step += 1
        self._called.clear()
        self._calls.clear()
        since_s, count = self._stretch or (lap.begin_s, 0)
        self._stretch = (since_s, count + 1)
        if self._end_s - since_s > FLUSH_S:
            self._flush_steps()
            # Not a boundary of anything: the next stretch begins where this one ends.
            self._stretch = (self._end_s, 0)
        self._review(lap, boundary.spent_s)

    def _book(self, lap: Lap, done_s: float, told: Told) -> None:
        """A step whose end was seen: its metrics, and its account where it is one of those that have one."""
        since_s, late_s, last = self._since or (lap.begin_s, 0.0, lap.step - 1)
        self._since = (since_s, late_s, last)
        apart = intersect([(since_s, done_s)], union(self._apart))
        begun_s = min(start for start, _ in [*((call.entry_s, 0) for call in lap.calls), *lap.inputs])
        if apart and lap.step == last + 1 and apart[-1][1] <= begun_s:
            # An evaluation between two steps: the step is whole behind it.
            since_s, apart = apart[-1][1], []
        if late_s + lap.late_s > UNSURE * (done_s - since_s):
            # Steps shorter than this thread can tell apart: several are taken together, until they are long enough.
            return
        step_s = (done_s - since_s - length(apart)) / (lap.step - last)
        self._measure_memory(lap.step)
        if self._metrics is not None:
            self._metrics.append(self._line(lap.step, step_s, told))
        whole = lap.step == last + 1 and self._is_warm() and not apart
        if whole and lap.step % max(self._stride, STRIDES[1]) == 0:
            step = measure_lap(lap, since_s, rank=self._rank, host=self._host, useful_s=self._useful_s())
            self._writer.append(step)
        self._since = (done_s, lap.late_s, lap.step)
        self._apart = [stretch for stretch in self._apart if stretch[1] > done_s]

    def _useful_s(self) -> float:
        flops, peak = self._program.flops_per_step, self._program.peak_flops_per_s
        return flops / peak if flops and peak else 0.0

    def _line(self, step: int, step_s: float, told: Told) -> Metrics:
        tokens = number(told.tokens) or self._program.tokens_per_step
        return Metrics(
            step=step,
            attempt=self._attempt,
            time_s=time.time(),
            loss=number(told.loss),
            gradient_norm=number(told.gradient_norm),
            learning_rate=number(told.learning_rate),
            step_s=step_s,
            tokens_per_s=tokens / step_s if tokens and step_s > 0 else None,
            mfu=self._useful_s() / step_s if self._useful_s() and step_s > 0 else None,
            memory_bytes=self._memory_bytes,
        )

    def _count_flops(self) -> None:
        self._program = with_flops(self._program, self._called)
        if self._rank == 0:
            write_program(self._folder, self._program)

    def _measure_memory(self, step: int) -> None:
        if self._memory_bytes is None or step % STRIDES[1] == 0:
            stats = [device.memory_stats() or {} for device in jax.local_devices()]
            peaks = [float(one["peak_bytes_in_use"]) for one in stats if "peak_bytes_in_use" in one]
            self._memory_bytes = max(peaks) if peaks else peak_resident_bytes()

    def _review(self, lap: Lap, spent_s: float) -> None:
        """Wait for fewer steps where waiting for these costs more than the budget."""
        self._spent.append(spent_s)
        if lap.done_s is None or len(self._spent) < REVIEWED or lap.step < self._first + WARM_STEPS + REVIEWED:
            return
        now = (time.thread_time(), lap.done_s)
        if self._reviewed is not None and self._stride == STRIDES[0]:
            own_s = (now[0] - self._reviewed[0] + sum(self._spent)) / len(self._spent)
            step_s = (now[1] - self._reviewed[1]) / len(self._spent)
            affordable = (stride for stride in STRIDES if own_s * min(1.0, 2 / stride) <= self._budget * step_s)
            self._stride = next(affordable, STRIDES[-1])
        self._reviewed = now
        self._spent.clear()

    # --- What stands beside the steps ------------------------------------------------------------------------------

    def _note_compiling(self, compiled: Compiled) -> None:
        self._compiling.append((compiled.start_s, compiled.end_s))
        self._apart.append((compiled.start_s, compiled.end_s))
        if not compiled.ends:
            return
        times = self._compiled[compiled.function] = self._compiled.get(compiled.function, 0) + 1
        if times > 1 and self._is_warm() and self._faults < MOST_FAULTS:
            took = length(union(self._compiling))
            name = compiled.function or "a function"
            self._fault(
                f"{name} was compiled again in step {self._step}, which took {took:.2f} s ({times} times so far): "
                "its arguments' shapes, types or shardings changed"
            )

    def _flush_compiling(self) -> None:
        for start_s, end_s in union(self._compiling):
            self._span("compile", start_s, end_s, step=self._step)
        self._compiling.clear()

    def _flush_steps(self) -> None:
        if self._stretch is not None and self._stretch[1]:
            self._span("step", self._stretch[0], self._end_s, step=self._step - 1, count=self._stretch[1])
        self._stretch = None

    def _drain(self, drain: Drain) -> None:
        if wait_for(self._loose):
            self._loose = ()
            self._end_s = max(self._end_s, time.perf_counter())
        if not drain.close:
            return
        self._flush_compiling()
        self._flush_steps()
        if drain.how:
            self._writer.append(Ended(step=max(self._first, self._step - 1), time_s=time.time(), how=drain.how))
        self._writer.close()
        if self._metrics is not None:
            self._metrics.close()

    def _span(self, name: str, start_s: float, end_s: float, *, step: int = 0, count: int = 1) -> None:
        start_s, end_s = self._epoch_s + start_s, self._epoch_s + end_s
        self._writer.append(Span(name=name, start_s=start_s, end_s=end_s, step=step, count=count))

    def _fault(self, what: str) -> None:
        self._faults += 1
        try:
            self._writer.append(Fault(step=self._step, time_s=time.time(), what=" ".join(what.split())))
        except OSError:
            # Nowhere left to say it.
            return


def number(told: Any) -> float | None:
    """A number of a step that is done; None where there is none, or it cannot be read, or JSON has no word for it."""
    if told is None:
        return None
    try:
        value = float(told)
    # Of an array that was handed on, or that other processes hold parts of.
    except (RuntimeError, TypeError, ValueError):
        return None
    return value if abs(value) < float("inf") else None
