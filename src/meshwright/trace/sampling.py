"""Profiling a step now and then: when, for how long, and what becomes of the trace."""

import shutil
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import record_function

from meshwright.account import Purpose
from meshwright.record import Step
from meshwright.record.kineto import PREFIX, STEP
from meshwright.record.kineto.apart import CountFlops, ReadStep, Reply, read_apart
from meshwright.record.kineto.flops import Count
from meshwright.trace.profiling import Profiling, Turns
from meshwright.trace.samples import Samples


class Sampling:
    """One rank's profiled steps: one by whose operators' shapes FLOPs are counted, and those that are sampled.

    A GPU step begins where the device finished the one before, so that one is profiled too: `lead` steps ahead.
    counted: the first step that may be counted. countable: whether the program's steps can be. idle: whether the sample
    before has been read. read: takes over a stopped profiler, the number of its step and whether that is the counted
    one, at once. fault: takes a line about what went wrong.
    """

    def __init__(
        self,
        samples: Samples,
        device: torch.device,
        *,
        lead: int,
        counted: int,
        countable: Callable[[], bool],
        idle: Callable[[], bool],
        read: Callable[[Profiling, int, bool], None],
        fault: Callable[[str], None],
    ) -> None:
        self.samples = samples
        self._lead = lead
        self._device = device
        self._countable = countable
        self._idle = idle
        self._read = read
        self._fault = fault
        self._turns = Turns(self.drop)
        self._profiling: Profiling | None = None
        self._step: record_function | None = None
        self._cpu_s = 0.0
        # The step that is measured, of those profiled.
        self._last = -1
        self._number = 0
        # Whether it is the one that is counted; from which step on one is to be, -1 once it was.
        self._counting = False
        self._counted = counted
        # Of the profilers that were stopped, whose steps the device may still be at: whether they counted.
        self._stopped: deque[bool] = deque()
        self._told_busy = False
        # Whether the sample that is due was begun once and could not be finished.
        self._dropped = False

    def open(self) -> None:
        """Take turns with the program's own profiler from now on; use ours once, for that may take seconds."""
        self._turns.open()
        if self._device.type == "cuda" and self._turns.free:
            profiling = self._turns.ours(lambda: Profiling(self._device))
            torch.ones(1, device=self._device)
            self._turns.ours(profiling.stop)

    def close(self) -> None:
        """No more samples."""
        self.drop()
        self._turns.close()

    @property
    def running(self) -> bool:
        """Whether the running step is profiled."""
        return self._profiling is not None

    def due(self, number: int) -> bool:
        """Whether the steps pause before step `number`, for turn()."""
        self._number = number
        if self.running:
            return number > self._last
        if 0 <= self._counted <= number and self._turns.free:
            self._counting = self._countable()
            if self._counting:
                return True
            self._counted = -1
        opening = self.samples.next - self._lead
        if opening < 0 or number < opening:
            return False
        if number == opening and self._turns.free and self._idle():
            return True
        if not self._turns.free and not self._told_busy:
            self._told_busy = True
            self._fault(f"step {self.samples.next} was to be profiled, but the program's own profiler was at work")
        self.samples.spent(number, 0.0)
        return False

    def turn(self) -> bool:
        """Open the profiler, or close it; whether it was closed.

        Never both between two steps. An annotation that one profiler saw begin, such as torch.profiler's own of a
        step, must not end under the next: torch then writes into memory that it has freed (2.13).
        """
        profiling = self._profiling
        if profiling is None:
            if self._counting:
                self._last = self._number
            else:
                self._last, self.samples.next = self.samples.next, -1
            self._profiling = self._turns.ours(lambda: Profiling(self._device, shapes=self._counting))
            return False
        self._profiling = None
        # Or the last step's kernels are not in the trace.
        if self._device.type == "cuda" and not self._counting:
            torch.cuda.synchronize(self._device)
        self._turns.ours(profiling.stop)
        counting, self._counting = self._counting, False
        if counting:
            self._counted = -1
        else:
            self._dropped = False
        self._stopped.append(counting)
        if self.samples.next - self._lead == self._number:
            self.samples.next += 1
        self._read(profiling, self._last, counting)
        return True

    def drop(self) -> None:
        """End a profiled step that cannot be finished."""
        profiling, self._profiling = self._profiling, None
        if profiling is None:
            return
        self._end_annotation()
        self._turns.ours(profiling.stop)
        profiling.let_go()
        if self._counting:
            self._counting, self._counted = False, self._number + 1
        elif not self._dropped:
            # Trainers evaluate when a step has ended: the next one is as good. Once, for some do so after each.
            self._dropped, self.samples.next = True, self._number + 1 + self._lead
        else:
            self._dropped = False
            self.samples.spent(self._number, 0.0)

    def step_begins(self) -> None:
        """Annotate the running step."""
        if self.running:
            self._cpu_s = time.thread_time()
            self._step = record_function(STEP)
            self._step.__enter__()

    def step_ends(self) -> None:
        """It ends. On a CPU the trace is told how long this thread was not put aside for others."""
        if self.running and self._device.type != "cuda":
            with record_function(f"{PREFIX}cpu {(time.thread_time() - self._cpu_s) * 1e6:.0f}"):
                pass
        self._end_annotation()

    def _end_annotation(self) -> None:
        step, self._step = self._step, None
        if step is not None:
            step.__exit__(None, None, None)

    def ended(self, paused_s: float, steps_s: list[float]) -> float:
        """A profiler's steps are over on the device; how much of their time was the profiler's."""
        if self._stopped.popleft():
            self.samples.charge(paused_s)
            return 0.0
        excess_s = self.samples.excess(steps_s)
        # By how much a GPU is behind must not decide which step is next, or ranks would disagree.
        self.samples.spent(max(self._number, self._last + 1 + self._lead), paused_s + excess_s)
        return excess_s


@contextmanager
def exported(profiling: Profiling, kept: Path | None = None) -> Iterator[str]:
    """The path of a stopped profiler's trace, until it is left at `kept`, or deleted; raises OSError, RuntimeError."""
    with tempfile.TemporaryDirectory(prefix="meshwright-") as folder:
        path = Path(folder) / "trace.json"
        profiling.export(path)
        yield str(path)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, kept)


def read_count(profiling: Profiling) -> Count:
    """Have the step's FLOPs counted in a process apart; where that fails the count says why. For any thread."""
    try:
        with exported(profiling) as path:
            reply = read_apart(CountFlops(path=path))
    except (OSError, RuntimeError) as error:
        reply = Reply(failure=f"{type(error).__name__}: {error}")
    return reply.count or Count(flops=None, source=f"not counted: {reply.failure}")


def read_sample(
    profiling: Profiling, step: int, *, rank: int, purposes: Mapping[str, Purpose], useful_s: float, kept: Path | None
) -> Step | str:
    """Export a stopped profiler's trace and have it read in a process apart; or, in one line, why that failed.

    For any thread. kept: where the trace is left, if at all.
    """
    try:
        with exported(profiling, kept) as path:
            request = ReadStep(
                path=path,
                step=step,
                rank=rank,
                host=socket.gethostname(),
                purposes=dict(purposes),
                useful_s=useful_s,
            )
            reply = read_apart(request)
    # A full disk, or whatever a new profiler does otherwise, must not end what it watches.
    except (OSError, RuntimeError) as error:
        return f"step {step} was profiled but not measured: {type(error).__name__}: {error}"
    if reply.step is None:
        return f"step {step} was profiled but not measured: {reply.failure}"
    return reply.step
