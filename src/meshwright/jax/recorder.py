"""The training loop's side of a record: takes the time, asks for nothing, and waits for nothing."""

import atexit
import gc
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from meshwright.account.intervals import Interval
from meshwright.jax.book import Book, Boundary, Drain, Noted, Outside
from meshwright.jax.compiling import CompileListener
from meshwright.jax.program import describe_program
from meshwright.jax.watch import Called, Watched, smallest
from meshwright.record import RunFolder, start_attempt, write_program
from meshwright.record.folder import free_name
from meshwright.spec import SettingError
from meshwright.spec.errors import nearest_choice

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

# What a stretch outside of steps may be, in the run account's words.
SPANS = ("evaluation", "checkpoint")
# Seconds that the program's exit waits for the last lines of a record that nobody closed.
PATIENCE_S = 5.0


def record(
    folder: str | Path,
    *,
    name: str | None = None,
    tokens_per_step: int | None = None,
    flops_per_step: float | None = None,
    budget: float = 0.005,
) -> "Recorder":
    """Begin to record this program into a run folder; a second start into the same folder is its next attempt.

    Every process of a program over several calls it, after jax.distributed.initialize. name: of the run, else the
    folder's. tokens_per_step: of all processes. flops_per_step: model FLOPs of a step of all devices together, forward
    and backward, in place of those counted. budget: the share of the steps' time that recording may take, above 0 and
    below 1. Raises SettingError where one of them cannot be.
    """
    began_s = time.perf_counter()
    path = Path(folder)
    check_settings(tokens_per_step, flops_per_step, budget)
    program = describe_program(name or path.resolve().name, tokens_per_step, flops_per_step)
    run = RunFolder(path)
    rank = jax.process_index()
    refusal: SettingError | None = None
    attempt = -1
    if rank == 0:
        try:
            attempt = begin_attempt(run)
            write_program(run, program)
        except SettingError as error:
            refusal = error
    if program.world_size > 1:
        # They must all write into the attempt that the first one made.
        attempt = int(multihost_utils.broadcast_one_to_all(np.int32(attempt)))
    if refusal is not None:
        raise refusal
    if attempt < 0:
        raise SettingError(f"run folder {path}", "cannot be written by process 0, which says why", "another folder")
    return Recorder(Book(run, attempt, program, rank=rank, began_s=began_s, budget=budget))


def check_settings(tokens_per_step: Any, flops_per_step: Any, budget: Any) -> None:
    """Refuse what would make numbers of the record wrong without anybody noticing."""
    if tokens_per_step is not None and (not is_number(tokens_per_step) or tokens_per_step != int(tokens_per_step)):
        raise SettingError(f"tokens_per_step={tokens_per_step!r}", "must be a whole number above 0", "batch * sequence")
    if flops_per_step is not None and not is_number(flops_per_step):
        raise SettingError(f"flops_per_step={flops_per_step!r}", "must be a number above 0", "leave it out: counted")
    if not is_number(budget) or budget >= 1:
        raise SettingError(f"budget={budget!r}", "must lie between 0 and 1", "budget=0.005")


def is_number(value: Any) -> bool:
    """Whether it is a finite number above 0, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0 and isfinite(value)


def begin_attempt(run: RunFolder) -> int:
    """Make the next attempt's folder. Raises SettingError where the folder cannot be a run of another program."""
    if run.job.exists():
        reason = "is a run that meshwright train made"
        raise SettingError(f"run folder {run.path}", reason, str(run.path.with_name(free_name(run.path))))
    try:
        return start_attempt(run, None)
    except OSError as error:
        raise SettingError(f"run folder {run.path}", f"cannot be made ({error.strerror})", "runs/mine") from None


class Recorder:
    """Records one process. Its methods are for the thread that runs the training loop."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._thread = threading.get_ident()
        self._listener = CompileListener(book.send)
        self._open = True
        # Whether programs are called for something else than a step.
        self._outside = False
        self._step = 0
        # Whether any program was called in this step.
        self._called = False
        self._begin_s: float | None = None
        self._inputs: list[Interval] = []
        self._collected: list[Interval] = []
        self._collecting_s: float | None = None
        self._loss: Any = None
        self._spent_s = 0.0
        gc.callbacks.append(self._collect)
        atexit.register(self._end, None)

    def watch(self, function: F) -> F:
        """The same function, with its calls recorded: for the one that jax.jit made of the step.

        Where several programs make a step, each is to be watched: what is not counts as the host's time.
        """
        if not callable(function):
            raise SettingError(f"watch({function!r})", "is no function", "watch(jax.jit(train_step))")
        name = getattr(function, "__name__", type(function).__name__)
        watched: Any = Watched(function, name, self._note)
        return watched

    def steps(self, loader: Iterable[T]) -> Iterator[T]:
        """Go through batches, one step each; the time until the next one is there is `input`."""
        batches = iter(loader)
        while True:
            with self.input():
                try:
                    batch = next(batches)
                except StopIteration:
                    break
            try:
                yield batch
            except GeneratorExit:
                # The loop was left; where it had called a program, that was a whole step.
                if self._called:
                    self.next_step()
                raise
            self.next_step()

    @contextmanager
    def input(self) -> Iterator[None]:
        """Around the wait for a batch, in a loop that has no loader to give to `steps`."""
        start_s = time.perf_counter()
        self._begin_s = start_s if self._begin_s is None else self._begin_s
        try:
            yield
        finally:
            self._inputs.append((start_s, time.perf_counter()))

    def log(self, *, loss: Any) -> None:
        """The step's loss, as the step returned it: it is read when it is there, and nothing waits for it."""
        self._loss = loss

    def next_step(self, *outputs: Any, loss: Any = None) -> None:
        """The end of a step, in a loop that has no loader to give to `steps`.

        outputs: what the step computed, where its program is not watched; from the last wait for a batch on, all of the
        step is then taken to be in that program.
        """
        now_s = time.perf_counter()
        begin_s = now_s if self._begin_s is None else self._begin_s
        self._loss = loss if loss is not None else self._loss
        if outputs:
            kept, devices = smallest(outputs)
            entry_s = self._inputs[-1][1] if self._inputs else begin_s
            self._send(Called("the step", entry_s, now_s, kept, devices, None))
        self._send(
            Boundary(self._step, begin_s, now_s, tuple(self._inputs), tuple(self._collected), self._loss, self._spent_s)
        )
        self._step += 1
        self._called = False
        self._loss = None
        self._inputs.clear()
        self._collected.clear()
        self._begin_s = time.perf_counter()
        self._spent_s = self._begin_s - now_s

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """A stretch that is no part of a step: "evaluation" or "checkpoint". Waits for the steps before it."""
        if name not in SPANS:
            raise SettingError(f'span("{name}")', "is no word of the run account", nearest_choice("name", name, SPANS))
        self._drain()
        start_s = time.perf_counter()
        self._outside = True
        try:
            yield
        finally:
            self._outside = False
            self._send(Outside(name, start_s, time.perf_counter()))

    def close(self) -> None:
        """Wait for what was computed and write the end. Without it a record lacks its last line, and no more."""
        self._end("finished")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._send(Noted(f"the program ended by {kind.__name__}: {error}"))
            self._end(None)

    # --- Between the loop's thread and the book ----------------------------------------------------------------------

    def _note(self, called: Called) -> None:
        if self._outside or threading.get_ident() != self._thread:
            return
        self._called = True
        self._begin_s = called.entry_s if self._begin_s is None else self._begin_s
        self._send(called)
        self._spent_s += time.perf_counter() - called.exit_s

    def _send(self, message: Any) -> None:
        if self._open:
            self._book.send(message)

    def _collect(self, phase: str, _: Mapping[str, int]) -> None:
        """Garbage collection, as gc tells it."""
        if threading.get_ident() != self._thread:
            return
        if phase == "start":
            self._collecting_s = time.perf_counter()
        elif self._collecting_s is not None:
            self._collected.append((self._collecting_s, time.perf_counter()))
            self._collecting_s = None

    def _drain(self, *, close: bool = False, how: str | None = None, patience_s: float | None = None) -> None:
        reached = threading.Event()
        self._send(Drain(reached, close, how))
        if self._open:
            reached.wait(patience_s)

    def _end(self, how: str | None) -> None:
        """Write what is left, once."""
        if not self._open:
            return
        self._listener.close()
        gc.callbacks.remove(self._collect)
        atexit.unregister(self._end)
        # A device that hangs must not keep a program that failed from ending.
        self._drain(close=True, how=how, patience_s=PATIENCE_S if how is None else None)
        self._open = False
