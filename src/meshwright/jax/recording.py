"""The training loop's side of a record: it takes the time, and waits for nothing that the loop would not wait for."""

import atexit
import gc
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

from meshwright.account.intervals import Interval
from meshwright.jax.book import Book, Boundary, Drain, Noted, Outside, Told
from meshwright.jax.compiling import CompileListener
from meshwright.jax.watch import Called, Watched, smallest
from meshwright.spec import SettingError
from meshwright.spec.errors import nearest_choice

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

# What a stretch outside of steps may be, in the run account's words.
OUTSIDE = ("evaluation", "checkpoint")
# Seconds that the program's exit waits for the last lines of a record that nobody closed: its device may hang.
PATIENCE_S = 5.0
END: Any = object()


class Recording:
    """One process's record, as the training loop holds it; for the loop's thread. Made by record(), in start.py."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._process, self._thread = os.getpid(), threading.get_ident()
        self._open = True
        # Whether programs are called for something else than a step.
        self._outside = False
        # Of the step that is under way: whether it called a program, when it began, waited and collected garbage.
        self._called = False
        self._begin_s: float | None = None
        self._inputs: list[Interval] = []
        self._collected: list[Interval] = []
        self._collecting_s: float | None = None
        self._told = Told()
        self._spent_s = 0.0
        self._listener = CompileListener(self._send)
        gc.callbacks.append(self._collect)
        atexit.register(self._end, "")

    # --- What the loop calls -----------------------------------------------------------------------------------------

    def watch(self, function: F) -> F:
        """The same function, with its calls recorded: for the one that jax.jit made of the step.

        Where several programs make a step, each is to be watched: what is not counts as the host's time.
        Raises SettingError where it cannot be called.
        """
        if not callable(function):
            raise SettingError(f"watch({function!r})", "is no function", "watch(jax.jit(train_step))")
        name = getattr(function, "__name__", type(function).__name__)
        watched: Any = Watched(function, name, self._note)
        return watched

    def steps(self, loader: Iterable[T], *, microbatches: int = 1) -> Iterator[T]:
        """The loader's batches; a step is each so many of them, and what is left at the end.

        The time until the next batch is there is `input`. A loop that is left by `break` has ended its step if it had
        called a program in it.
        """
        if type(microbatches) is not int or microbatches < 1:
            raise SettingError(f"microbatches={microbatches!r}", "must be a whole number, at least 1", "microbatches=1")
        return self._steps(loader, microbatches)

    def _steps(self, loader: Iterable[T], microbatches: int) -> Iterator[T]:
        batches = iter(loader)
        held = 0
        while True:
            with self.input():
                batch = next(batches, END)
            if batch is END:
                break
            try:
                yield batch
            except GeneratorExit:
                held = 1 if self._called else 0
                break
            held += 1
            if held == microbatches:
                self.next_step()
                held = 0
        if held:
            self.next_step()
        # What was waited for last was no batch, so no step begins there.
        self._begin_s = None
        self._inputs.clear()

    @contextmanager
    def input(self) -> Iterator[None]:
        """Around the wait for a batch, in a loop that has no loader to give to `steps`."""
        start_s = time.perf_counter()
        self._begin_s = start_s if self._begin_s is None else self._begin_s
        try:
            yield
        finally:
            self._inputs.append((start_s, time.perf_counter()))

    def log(
        self, *, loss: Any = None, gradient_norm: Any = None, learning_rate: Any = None, tokens: int | None = None
    ) -> None:
        """Say something of the running step. An array is read when it is there, and nothing waits for it, but it must
        not be donated to the next step; tokens: of all processes."""
        before = self._told
        self._told = Told(
            before.loss if loss is None else loss,
            before.gradient_norm if gradient_norm is None else gradient_norm,
            before.learning_rate if learning_rate is None else learning_rate,
            before.tokens if tokens is None else tokens,
        )

    def next_step(
        self,
        outputs: Any = None,
        *,
        loss: Any = None,
        gradient_norm: Any = None,
        learning_rate: Any = None,
        tokens: int | None = None,
    ) -> None:
        """A step has ended and the next one begins, in a loop that has no loader to give to `steps`.

        outputs: what the step computed, where its program is not watched; from the last wait for a batch on, all of the
        step is then taken to be in that program.
        """
        now_s = time.perf_counter()
        begin_s = now_s if self._begin_s is None else self._begin_s
        self.log(loss=loss, gradient_norm=gradient_norm, learning_rate=learning_rate, tokens=tokens)
        if outputs is not None:
            kept, devices = smallest(outputs)
            entry_s = self._inputs[-1][1] if self._inputs else begin_s
            self._send(Called("the step", entry_s, now_s, kept, devices, None))
        inputs, collected = tuple(self._inputs), tuple(self._collected)
        self._send(Boundary(begin_s, now_s, inputs, collected, self._told, self._spent_s))
        self._called = False
        self._told = Told()
        self._inputs.clear()
        self._collected.clear()
        self._begin_s = time.perf_counter()
        self._spent_s = self._begin_s - now_s

    def span(self, name: str) -> AbstractContextManager[None]:
        """A stretch that belongs to no step: "evaluation" or "checkpoint". Waits for the programs called before it.

        Raises SettingError for another name.
        """
        if name not in OUTSIDE:
            near = nearest_choice("name", name, OUTSIDE)
            raise SettingError(f'span("{name}")', "is no stretch of a run", near)
        return self._span(name)

    @contextmanager
    def _span(self, name: str) -> Iterator[None]:
        self._drain()
        start_s = time.perf_counter()
        self._outside = True
        try:
            yield
        finally:
            self._outside = False
            self._send(Outside(name, start_s, time.perf_counter()))

    def close(self, how: str = "finished") -> None:
        """Wait for what was computed and write the end; `how`: finished or stopped. Without it a record lacks its last
        line, and no more."""
        self._end(how)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None:
            self._send(Noted(f"{kind.__name__}: {error}"))
        self._end("finished" if kind is None else "")

    # --- Between the loop's thread and the book ----------------------------------------------------------------------

    def _note(self, called: Called) -> None:
        if self._outside or threading.get_ident() != self._thread:
            return
        self._called = True
        self._begin_s = called.entry_s if self._begin_s is None else self._begin_s
        self._send(called)
        self._spent_s += time.perf_counter() - called.exit_s

    def _send(self, message: Any) -> None:
        # A process forked off has no thread that would take it.
        if self._open and os.getpid() == self._process:
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

    def _drain(self, *, close: bool = False, how: str = "", patience_s: float | None = None) -> None:
        reached = threading.Event()
        self._send(Drain(reached, close, how))
        if self._open:
            reached.wait(patience_s)

    def _end(self, how: str) -> None:
        """Write what is left, once."""
        if not self._open or os.getpid() != self._process:
            return
        atexit.unregister(self._end)
        self._listener.close()
        gc.callbacks.remove(self._collect)
        self._drain(close=True, how=how, patience_s=None if how else PATIENCE_S)
        self._open = False
