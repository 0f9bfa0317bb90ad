"""One profiled stretch of the training thread: opened, closed, exported; and the user's own profiler goes first."""

import gc
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import profiler as torch_profiler
from torch.profiler import ProfilerActivity, profile, record_function

from meshwright.record.kineto import PREFIX

# What every way to profile goes through: torch.profiler, torch.autograd.profiler and emit_nvtx.
DOORS = ("_prepare_profiler", "_enable_profiler", "_disable_profiler")


class Profiling:
    """A profiler that is running, on the thread that made it.

    Built anew each time and without `acc_events`: with it, stopping takes seconds of Python over the events (24,000
    of them: 1.8 s instead of 75 ms, torch 2.13).
    """

    def __init__(self, device: torch.device, *, shapes: bool = False) -> None:
        """shapes: tell those of operators' inputs, and nothing of the device."""
        gpu = [ProfilerActivity.CUDA] if device.type == "cuda" and not shapes else []
        self._profile = profile(activities=[ProfilerActivity.CPU, *gpu], record_shapes=shapes)
        self._collect = GarbageMarks()
        self._profile.start()
        self._collect.open()

    def stop(self) -> None:
        """End it. On a GPU this waits for the device."""
        self._collect.close()
        self._profile.stop()

    def export(self, path: Path) -> None:
        """Write the trace and let go of it; any thread may, and others run on meanwhile: 6 MB in 50 ms."""
        self._profile.export_chrome_trace(str(path))
        self.let_go()

    def let_go(self) -> None:
        """Drop what was recorded."""
        # Nothing else breaks the cycles it is in where a program keeps garbage from being collected: 3.7 kB an event.
        self._profile.profiler = None


class GarbageMarks:
    """Puts an annotation around what Python's garbage collector does."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._running: record_function | None = None

    def open(self) -> None:
        """From now on."""
        gc.callbacks.append(self._mark)

    def close(self) -> None:
        """No more."""
        gc.callbacks.remove(self._mark)
        self._end()

    def _mark(self, phase: str, _info: dict[str, int]) -> None:
        # Another thread's collection stops this one too, but only the thread that is profiled can be annotated; and
        # an interpreter that is being taken down collects when there is nothing left to annotate with.
        if threading.get_ident() != self._thread or sys.is_finalizing():
            return
        if phase == "start":
            self._running = record_function(f"{PREFIX}collect")
            self._running.__enter__()
        else:
            self._end()

    def _end(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.__exit__(None, None, None)


class Turns:
    """Whose turn it is to profile. A process has one profiler, and starting a second one raises in the program.

    Whoever else comes to it first asks `give_way` to stop ours, and is let be until they are done. torch tells nobody
    that a profiler has been prepared but not started yet, as torch.profiler's schedules do, so its three functions are
    wrapped while recording goes on.
    """

    def __init__(self, give_way: Callable[[], None]) -> None:
        self._give_way = give_way
        self._ours = False
        self._theirs = False
        self._process = os.getpid()
        self._doors: dict[str, Any] = {}

    def open(self) -> None:
        """Begin to watch."""
        self._doors = {name: getattr(torch_profiler, name) for name in DOORS}
        for name in DOORS:
            setattr(torch_profiler, name, self._watched(name))

    def close(self) -> None:
        """Put everything back."""
        for name, door in self._doors.items():
            setattr(torch_profiler, name, door)

    @property
    def free(self) -> bool:
        """Whether nobody else profiles."""
        return not self._theirs and not torch.autograd._profiler_enabled()

    def ours(self, act: Callable[[], Any]) -> Any:
        """Do something that is not theirs."""
        self._ours = True
        try:
            return act()
        finally:
            self._ours = False

    def _watched(self, name: str) -> Callable[..., Any]:
        def door(*arguments: Any, **options: Any) -> Any:
            # A forked worker that profiles itself is none of our concern.
            if not self._ours and os.getpid() == self._process:
                self._theirs = name != "_disable_profiler"
                if self._theirs:
                    self._give_way()
            return self._doors[name](*arguments, **options)

        return door
