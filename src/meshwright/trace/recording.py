"""Recording any PyTorch training loop: three lines in the loop, a run folder that `meshwright explain` reads."""

import atexit
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.profiler import record_function

from meshwright.account import Purpose
from meshwright.record import Ended, Fault, Memory, Metrics, RunFolder, start_attempt, write_program
from meshwright.record.kineto import PREFIX
from meshwright.spec import Precision, SettingError
from meshwright.trace.background import Background
from meshwright.trace.clock import Clock
from meshwright.trace.facts import device_of
from meshwright.trace.flops import compile_seconds
from meshwright.trace.held import Holdings
from meshwright.trace.life import Life, Moment, Told
from meshwright.trace.meeting import Meeting
from meshwright.trace.memory import peak_memory_bytes
from meshwright.trace.options import Options, check_folder, check_options, models_of, optimizers_of
from meshwright.trace.profiling import Profiling
from meshwright.trace.samples import Samples
from meshwright.trace.sampling import Sampling, read_sample
from meshwright.trace.work import Work

B = TypeVar("B")

# What stands outside of steps, by the words of the run account.
OUTSIDE = ("evaluation", "checkpoint")
# For the last sample to be read, at the end.
PATIENCE_S = 120.0
END = object()


def record(
    run: str | os.PathLike[str],
    model: nn.Module | Sequence[nn.Module] | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    name: str = "",
    trainer: str = "a PyTorch loop",
    flops_per_step: float | None = None,
    tokens_per_step: int | None = None,
    precision: Precision | None = None,
    groups: Mapping[str, Purpose] | None = None,
    budget: float | None = None,
    every_steps: int | None = None,
    keep_traces: bool = False,
    first_step: int = 0,
) -> "Recording":
    """Begin to record this rank's training into the run folder `run`. Every rank calls it, after init_process_group.

    model, optimizer: what is trained, and by what, for the memory account and the count of parameters.
    name, trainer: in words, for people.
    flops_per_step: model FLOPs of one step, all ranks together, forward and backward; None: counted in the second step,
        but in a program that torch.compile has compiled, whose count would be wrong.
    tokens_per_step: of all ranks. precision: of most matrix products; None: as counted.
    groups: purposes of process groups by their descriptions ("replica", "tensor", ...), where you know better.
    budget: the share of the time that sampled steps may cost (0.005). every_steps: a sample each so many steps instead;
        0: none. keep_traces: keep the profiler's traces in the run folder.
    first_step: the number of the first step, of a training that resumes.

    Raises SettingError where an option or the folder cannot be used. After that nothing is ever raised into the
    program: what recording fails at is a fault in the record.
    """
    began_s = process_start_s()
    folder = RunFolder(Path(run))
    options = check_options(folder, locals())
    models, optimizers = models_of(model), optimizers_of(optimizer)
    meeting = Meeting()
    attempt = agree_on_attempt(folder, meeting)
    return Recording(folder, attempt, options, meeting, models, optimizers, began_s=began_s)


def agree_on_attempt(folder: RunFolder, meeting: Meeting) -> int:
    """The number of the attempt, which rank 0 begins; where it cannot, all ranks say why."""
    if meeting.rank != 0:
        word = meeting.wait("attempt")
        if word.isdecimal():
            return int(word)
        raise SettingError(*word.split("\n"))
    try:
        check_folder(folder)
        attempt = start_attempt(folder, None)
    except SettingError as error:
        meeting.tell("attempt", f"{error.setting}\n{error.reason}\n{error.nearest}")
        raise
    except OSError as error:
        refused = SettingError(f"run folder {folder.path}", f"cannot be made ({error.strerror})", "runs/mine")
        meeting.tell("attempt", f"{refused.setting}\n{refused.reason}\n{refused.nearest}")
        raise refused from None
    meeting.tell("attempt", str(attempt))
    return attempt


def process_start_s() -> float:
    """When this process was started, seconds since the epoch; now, where the system does not tell."""
    now = time.time()
    try:
        # man proc_pid_stat: starttime is the 22nd field, counted in ticks from boot; the 2nd may hold blanks.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        up_s = float(Path("/proc/uptime").read_text().split()[0])
        return min(now, now - up_s + ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return now


class Recording:
    """One rank's record, as the training loop holds it. Made by record()."""

    def __init__(
        self,
        folder: RunFolder,
        attempt: int,
        options: Options,
        meeting: Meeting,
        models: Sequence[nn.Module],
        optimizers: Sequence[Optimizer],
        *,
        began_s: float,
    ) -> None:
        self.folder, self.attempt = folder, attempt
        self.rank = meeting.rank
        self.number = options.first_step
        self._options = options
        self._process = os.getpid()
        parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        self._device = device = device_of(models, parameters)
        self._events = folder.events(attempt, self.rank)
        self._background = Background(self._listen)
        self._work = Work(folder, options, meeting, device, models, parameters)
        self._holdings = Holdings(models, optimizers, device)
        # A GPU step begins where the device finished the one before, so that one must be in the trace too.
        lead = 1 if device.type == "cuda" else 0
        every, budget = options.every_steps, options.budget
        self._sampling = Sampling(
            Samples(meeting, first=options.first_step, every=every, budget=budget, lead=lead),
            device,
            lead=lead,
            idle=lambda: not self._background.busy,
            read=self._read_apart,
            fault=self._fault,
        )
        self._clock = Clock(device)
        self._life = Life(began_s, self._write, self._stepped, self._sampling.ended)
        self._moments: deque[Moment] = deque()
        self._told = Told()
        self._compiled_s = compile_seconds()
        # "ready" before the first step, "in" one, "out" of the steps for a while or for good; "over" once recording has
        # ended, well or not.
        self._state = "ready"
        self._closed = False
        # What the time before the first step is booked as; the state in which a span was entered.
        self._before = "startup"
        self._within = self._state
        self._open_files()
        self._sampling.open()
        self._ready = self._clock.mark()
        atexit.register(self._at_exit)

    def _open_files(self) -> None:
        paths = [self._events, *([self.folder.metrics] if self.rank == 0 else [])]
        try:
            if self.rank == 0:
                write_program(self.folder, self._work.program())
            self._background.open(*paths)
        except OSError as error:
            reason = f"cannot be written ({error.strerror})"
            raise SettingError(f"run folder {self.folder.path}", reason, "a folder on a disk with room") from None

    # --- What the loop calls ------------------------------------------------------------------------------------------

    def steps(self, loader: Iterable[B], *, microbatches: int = 1) -> Iterator[B]:
        """The loader's batches; a step is each so many of them, and what is left at the loader's end.

        A loop that is left by `break` has not ended the step that it is in.
        """
        if isinstance(microbatches, bool) or microbatches < 1:
            raise SettingError(f"microbatches={microbatches!r}", "must be a whole number, at least 1", "microbatches=1")
        return self._steps(loader, microbatches)

    def _steps(self, loader: Iterable[B], microbatches: int) -> Iterator[B]:
        held = 0
        batches = iter(loader)
        self._try(self._begin)
        try:
            while True:
                with self.input():
                    batch = next(batches, END)
                if batch is END:
                    break
                yield batch  # pyright: ignore[reportReturnType]
                held += 1
                if held == microbatches:
                    self.next_step()
                    held = 0
            if held:
                self.next_step()
        finally:
            self._try(self._leave)

    def next_step(
        self,
        *,
        loss: Tensor | float | None = None,
        gradient_norm: Tensor | float | None = None,
        learning_rate: float | None = None,
        tokens: int | None = None,
    ) -> None:
        """A step has ended and the next one begins. The first step began when record() returned, if not in `steps`."""
        self.log(loss=loss, gradient_norm=gradient_norm, learning_rate=learning_rate, tokens=tokens)
        self._try(self._end_step)

    def log(
        self,
        *,
        loss: Tensor | float | None = None,
        gradient_norm: Tensor | float | None = None,
        learning_rate: float | None = None,
        tokens: int | None = None,
    ) -> None:
        """Say something of the running step. A tensor is copied without waiting for it; tokens: of all ranks."""

        def keep() -> None:
            told = self._told
            told.loss = told.loss if loss is None else scalar(loss)
            told.gradient_norm = told.gradient_norm if gradient_norm is None else scalar(gradient_norm)
            told.learning_rate = told.learning_rate if learning_rate is None else float(learning_rate)
            told.tokens = told.tokens if tokens is None else int(tokens)

        self._try(keep)

    def span(self, name: str) -> AbstractContextManager[None]:
        """A stretch that belongs to no step: "evaluation" or "checkpoint". Within a step, that step goes on after it.

        Raises SettingError for another name.
        """
        if name not in OUTSIDE:
            raise SettingError(f'span("{name}")', "is no stretch of a run", 'span("evaluation") or span("checkpoint")')
        return self._span(name)

    @contextmanager
    def _span(self, name: str) -> Iterator[None]:
        self._try(self._leave_for_span)
        try:
            yield
        finally:
            self._try(lambda: self._return_from_span(name))

    def input(self) -> AbstractContextManager[Any]:
        """Around the making of a batch, where no loader does that."""
        return record_function(f"{PREFIX}input") if self._sampling.running else nullcontext()

    def close(self, how: str = "finished") -> None:
        """End the record; `how`: finished or stopped. Waits for the last sample to be read, two minutes at most."""
        self._close(how)

    def _close(self, how: str) -> None:
        if self._closed or os.getpid() != self._process:
            return
        atexit.unregister(self._at_exit)
        self._try(self._leave)
        self._try(self._wind_up)
        self._state, self._closed = "over", True
        self._background.settle(PATIENCE_S)
        if how:
            self._write(Ended(step=self.number - 1, time_s=time.time(), how=how))
        self._background.close()

    def __enter__(self) -> "Recording":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._fault(f"{type(error).__name__}: {error}")
        self._close("finished" if kind is None else "")

    # --- What that does -----------------------------------------------------------------------------------------------

    def _begin(self, name: str = "") -> None:
        first = self._state == "ready"
        if first:
            self._sampling.samples.begin()
        elif self._state != "out":
            return
        self._state = "in"
        self._moments.append(Moment("begin", self._clock.mark(), self.number, self._before if first else name))
        self._watch()
        self._sampling.step_begins()

    def _leave_for_span(self) -> None:
        self._within = self._state
        if self._state == "ready":
            # What came before has ended here.
            self._moments.append(Moment("begin", self._clock.mark(), self.number, self._before))
            self._before = ""
        if self._state == "in":
            self._leave()
        else:
            self._moments.append(Moment("leave", self._clock.mark(), self.number))

    def _return_from_span(self, name: str) -> None:
        if self._within == "in":
            self._begin(name)
            return
        mark = self._clock.mark()
        self._moments += [Moment("begin", mark, self.number, name), Moment("leave", mark, self.number)]
        self._ready = mark
        self._resolve()

    def _leave(self) -> None:
        if self._state != "in":
            return
        self._sampling.drop()
        self._unwatch()
        self._moments.append(Moment("leave", self._clock.mark(), self.number))
        self._state = "out"
        self._resolve()

    def _end_step(self) -> None:
        if self._state == "ready":
            self._sampling.samples.begin()
            self._moments.append(Moment("begin", self._ready, self.number, self._before))
            self._state = "in"
        elif self._state != "in":
            return
        self._sampling.step_ends()
        mark = self._clock.mark()
        compiled_s, self._compiled_s = compile_seconds() - self._compiled_s, compile_seconds()
        profiled = self._sampling.running
        told, self._told = self._told, Told()
        self._moments.append(Moment("step", mark, self.number, "", profiled, max(0.0, compiled_s), told))
        self._watched()
        self.number += 1
        if self._sampling.due(self.number):
            self._moments.append(Moment("leave", mark, self.number))
            closed = self._sampling.turn()
            self._moments.append(Moment("begin", self._clock.mark(), self.number, "measurement", closed))
        self._watch()
        self._sampling.step_begins()
        self._resolve()

    def _watch(self) -> None:
        """The second step is watched: by then all states are there, and what compiles has."""
        if self.number == self._options.first_step + 1:
            self._holdings.open()
            self._work.open()

    def _watched(self) -> None:
        if self.number == self._options.first_step + 1:
            self._work.close()
            self._write(Memory(step=self.number, account=self._holdings.close()))

    def _unwatch(self) -> None:
        self._holdings.drop()
        self._work.drop()

    def _resolve(self) -> None:
        while self._moments and (at_s := self._clock.resolve(self._moments[0].mark)) is not None:
            self._life.take(self._moments.popleft(), at_s)

    def _wind_up(self) -> None:
        self._sampling.close()
        self._unwatch()
        self._clock.settle()
        self._resolve()

    def _stepped(self, moment: Moment, step_s: float, at_s: float) -> None:
        if not moment.profiled:
            self._sampling.samples.took(step_s)
        if self.rank != 0 or moment.told is None:
            return
        told = moment.told
        tokens = told.tokens or self._options.tokens_per_step
        line = Metrics(
            step=moment.step,
            attempt=self.attempt,
            time_s=at_s,
            loss=finite(told.loss),
            gradient_norm=finite(told.gradient_norm),
            learning_rate=told.learning_rate,
            step_s=step_s,
            tokens_per_s=tokens / step_s if tokens and step_s > 0 else None,
            mfu=self._work.utilisation(step_s),
            memory_bytes=peak_memory_bytes(self._device),
        )
        self._background.write(self.folder.metrics, line)

    def _listen(self) -> None:
        """In the background."""
        try:
            self._sampling.samples.listen(self.number)
            self._work.listen()
        except Exception as error:
            # The store is gone with rank 0, or the disk is full.
            self._fault(f"what ranks tell each other was lost: {type(error).__name__}: {error}")

    def _read_apart(self, profiling: Profiling, step: int) -> None:
        kept = self.folder.attempt(self.attempt) / "traces" / f"step-{step}" / f"rank-{self.rank}.json"

        def read() -> None:
            found = read_sample(
                profiling,
                step,
                rank=self.rank,
                purposes=self._options.groups,
                useful_s=self._work.useful_s,
                kept=kept if self._options.keep_traces else None,
            )
            self._fault(found) if isinstance(found, str) else self._write(found)

        self._background.do(read)

    def _write(self, line: Any) -> None:
        self._background.write(self._events, line)

    def _fault(self, what: str) -> None:
        self._write(Fault(step=self.number, time_s=time.time(), what=" ".join(what.split())))

    def _try(self, act: Callable[[], None]) -> None:
        """Do something that must not end the program: recording ends instead."""
        if self._state == "over":
            return
        try:
            act()
        except Exception as error:
            self._state = "over"
            self._fault(f"recording stopped: {type(error).__name__}: {error}")
            for part in (self._sampling.close, self._unwatch):
                try:
                    part()
                except Exception as another:
                    self._fault(f"and {type(another).__name__}: {another}")

    def _at_exit(self) -> None:
        """The program ends without close(): all is written but that it ended well."""
        self._close("")


def scalar(value: Tensor | float) -> Any:
    """A number; of a tensor on a GPU, host memory into which it will have been copied when the device is there."""
    if not isinstance(value, Tensor):
        return float(value)
    own = value.detach()
    own = own.to_local() if isinstance(own, DTensor) else own
    if own.device.type == "cpu":
        return float(own)
    there = torch.empty((), dtype=own.dtype, pin_memory=True)
    return there.copy_(own.reshape(()), non_blocking=True)


def finite(value: Any) -> float | None:
    """A number that JSON has a word for, or None."""
    number = None if value is None else float(value)
    return number if number is not None and math.isfinite(number) else None
