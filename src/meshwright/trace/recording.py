"""Recording any PyTorch training loop: three lines in the loop, a run folder that `meshwright explain` reads."""

import atexit
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import record_function

from meshwright.record import Ended, Fault, Memory, RunFolder, write_program
from meshwright.record.kineto import PREFIX
from meshwright.spec import SettingError
from meshwright.trace.background import Background
from meshwright.trace.clock import Clock, Mark
from meshwright.trace.compiled import compile_seconds
from meshwright.trace.facts import device_of
from meshwright.trace.held import Holdings
from meshwright.trace.life import END, Life, Moment
from meshwright.trace.meeting import Meeting
from meshwright.trace.memory import peak_memory_bytes
from meshwright.trace.options import Options
from meshwright.trace.profiling import Profiling
from meshwright.trace.samples import Samples
from meshwright.trace.sampling import Sampling, read_count, read_sample
from meshwright.trace.told import Told, scalar
from meshwright.trace.work import Work

B = TypeVar("B")

# What stands outside of steps, by the words of the run account.
OUTSIDE = ("evaluation", "checkpoint")
# For the last sample to be read, at the end.
PATIENCE_S = 120.0
# For the other ranks to tell what they counted; for that sample, where the program has not said that it ends.
LAST_WORD_S = 5.0
NO_BATCH = object()


class Recording:
    """One rank's record, as the training loop holds it. Made by record(), in start.py."""

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
            counted=options.first_step + 1,
            countable=self._work.countable,
            idle=lambda: every is not None or not self._background.busy("sample"),
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
        # For memory the second, as for FLOPs: by then all states are there, and what compiles has.
        self._watched_step = options.first_step + 1
        self._peak_bytes = peak_memory_bytes(device)
        self._deaf = False
        self._counted = threading.Event()
        self._counted.set()
        # What the time before the first step is booked as; the state in which a span was entered.
        self._before = "startup"
        self._within = self._state
        self._open_files()
        self._try(self._sampling.open)
        self._ready = self._clock.mark()
        atexit.register(self._close, "")

    def _open_files(self) -> None:
        paths = [self._events, *([self.folder.metrics] if self.rank == 0 else [])]
        try:
            if self.rank == 0:
                write_program(self.folder, self._work.program())
            self._background.open(*paths)
        except OSError as error:
            reason = f"cannot be written ({error.strerror})"
            raise SettingError(f"run folder {self.folder.path}", reason, "a folder on a disk with room") from None

    def steps(self, loader: Iterable[B], *, microbatches: int = 1) -> Iterator[B]:
        """The loader's batches; a step is each so many of them, and what is left at the loader's end.

        A loop that is left by `break` has not ended the step that it is in.
        """
        if type(microbatches) is not int or microbatches < 1:
            raise SettingError(f"microbatches={microbatches!r}", "must be a whole number, at least 1", "microbatches=1")
        return self._steps(loader, microbatches)

    def _steps(self, loader: Iterable[B], microbatches: int) -> Iterator[B]:
        held = 0
        batches = iter(loader)
        ended = False
        self._try(self._begin)
        try:
            while True:
                with self.input():
                    batch = next(batches, NO_BATCH)
                if batch is NO_BATCH:
                    break
                yield batch  # pyright: ignore[reportReturnType]
                held += 1
                if held == microbatches:
                    self.next_step()
                    held = 0
            if held:
                self.next_step()
            ended = True
        finally:
            self._try(lambda: self._leave(whole=ended))

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

        try:
            keep()
        except Exception as error:
            self._fault(f"what step {self.number} said was not recorded: {type(error).__name__}: {error}")

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
        """how: "" where the program ends without close(): all is written but that it ended well."""
        if self._closed or os.getpid() != self._process:
            return
        atexit.unregister(self._close)
        self._try(lambda: self._leave(name=END))
        self._try(self._wind_up)
        self._state, self._closed = "over", True
        self._background.settle(PATIENCE_S if how else LAST_WORD_S)
        if how:
            self._write(Ended(step=self.number - 1, time_s=time.time(), how=how))
        self._background.close()
        if how:
            with suppress(Exception):
                self._work.settle(LAST_WORD_S)

    def __enter__(self) -> "Recording":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._fault(f"{type(error).__name__}: {error}".removesuffix(": "))
        self._close("finished" if kind is None else "")

    def _begin(self, name: str = "") -> None:
        first = self._state == "ready"
        if not first and self._state != "out":
            return
        self._state = "in"
        mark = self._clock.mark()
        self._moments.append(Moment("begin", mark, self.number, self._before if first else name))
        self._begin_step(mark)

    def _leave_for_span(self) -> None:
        self._within = self._state
        if self._state == "ready":
            # What came before has ended here.
            self._moments.append(Moment("begin", self._clock.mark(), self.number, self._before))
            self._before = ""
        if self._state == "in":
            self._leave(whole=False)
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

    def _leave(self, *, whole: bool = True, name: str = "") -> None:
        """whole: the running step has not done anything yet. name: END at the end of all."""
        if self._state != "in":
            return
        self._sampling.drop()
        self._holdings.drop()
        if not whole and self.number == self._watched_step:
            self._watched_step += 1
        self._moments.append(Moment("leave", self._clock.mark(), self.number, name))
        self._state = "out"
        self._resolve()

    def _end_step(self) -> None:
        if self._state == "ready":
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
        self._begin_step(mark)
        self._resolve()

    def _begin_step(self, mark: Mark) -> None:
        """At a mark that has been noted."""
        if self._sampling.due(self.number):
            self._moments.append(Moment("leave", mark, self.number))
            closed = self._sampling.turn()
            self._moments.append(Moment("begin", self._clock.mark(), self.number, "measurement", closed))
        if self.number == self._watched_step:
            self._holdings.open()
        self._sampling.step_begins()

    def _watched(self) -> None:
        if self.number == self._watched_step:
            self._write(Memory(step=self.number, account=self._holdings.close()))

    def _resolve(self) -> None:
        while self._moments and (at_s := self._clock.resolve(self._moments[0].mark)) is not None:
            self._life.take(self._moments.popleft(), at_s)

    def _wind_up(self) -> None:
        self._sampling.close()
        self._holdings.drop()
        self._clock.settle()
        self._resolve()

    def _stepped(self, moment: Moment, step_s: float, at_s: float) -> None:
        self._sampling.samples.took(step_s, profiled=moment.profiled, beside=self._background.busy("count", "sample"))
        if self.rank != 0 or moment.told is None:
            return
        line = moment.told.line(
            step=moment.step,
            attempt=self.attempt,
            time_s=at_s,
            step_s=step_s,
            tokens=self._options.tokens_per_step,
            mfu=self._work.utilisation(step_s),
            memory_bytes=self._peak_bytes,
        )
        self._background.write(self.folder.metrics, line)

    def _listen(self) -> None:
        """In the background."""
        self._peak_bytes = peak_memory_bytes(self._device)
        if self._deaf:
            return
        try:
            self._sampling.samples.listen(self.number)
            self._work.listen()
        except OSError as error:
            self._deaf = True
            self._fault(f"program.json was not written: {error}")
        except Exception:
            # Rank 0 is gone, and the store with it: in good order at the end, or its own record tells of it.
            self._deaf = True

    def _read_apart(self, profiling: Profiling, step: int, counting: bool) -> None:
        kept = self.folder.attempt(self.attempt) / "traces" / f"step-{step}" / f"rank-{self.rank}.json"

        def count() -> None:
            try:
                self._work.take(read_count(profiling))
            finally:
                self._counted.set()

        def read() -> None:
            # What is useful of the step depends on it.
            self._counted.wait(PATIENCE_S)
            found = read_sample(
                profiling,
                step,
                rank=self.rank,
                purposes=self._options.groups,
                useful_s=self._work.useful_s,
                kept=kept if self._options.keep_traces else None,
            )
            self._fault(found) if isinstance(found, str) else self._write(found)

        if counting:
            self._counted.clear()
        self._background.do("count" if counting else "sample", count if counting else read)

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
            for part in (self._sampling.close, self._holdings.drop):
                try:
                    part()
                except Exception as another:
                    self._fault(f"and {type(another).__name__}: {another}")
