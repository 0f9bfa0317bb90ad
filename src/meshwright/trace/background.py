"""What recording does beside the training: writes lines, listens to the other ranks, has traces read."""

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from meshwright.record import LineWriter

# Between two looks at what there is to do. A program that is killed loses the lines of this long.
TICK_S = 0.5


class Background:
    """One thread. The training thread only ever hands it things, and waits for nothing.

    listen: called at each tick. A forked process, such as a data loader's worker, has no such thread, and what it
    inherits is never used there.
    """

    def __init__(self, listen: Callable[[], None]) -> None:
        self._listen = listen
        self._lines: deque[tuple[Path, msgspec.Struct]] = deque()
        self._writers: dict[Path, LineWriter] = {}
        self._over = threading.Event()
        self._jobs: list[threading.Thread] = []
        # Not to be waited for at the interpreter's end, when the training has crashed.
        self._thread = threading.Thread(target=self._run, name="meshwright", daemon=True)

    def open(self, *paths: Path) -> None:
        """Open the files, of which this is the one writer, and begin. Raises OSError where that fails."""
        self._writers = {path: LineWriter(path) for path in paths}
        self._thread.start()

    def write(self, path: Path, line: msgspec.Struct) -> None:
        """Append a line, soon."""
        self._lines.append((path, line))

    def do(self, name: str, job: Callable[[], None]) -> None:
        """Do something that takes long, in a thread of its own. Waits where another and one before it of its name are
        not done: who asks for more than this machine can do is slowed down, and jobs do not pile up.
        """
        for thread in [thread for thread in self._jobs if thread.name == name][:-1]:
            thread.join()
        self._jobs = [thread for thread in self._jobs if thread.is_alive()]
        thread = threading.Thread(target=job, name=name, daemon=True)
        self._jobs.append(thread)
        thread.start()

    def busy(self, *names: str) -> bool:
        """Whether a job of one of these names is not done yet."""
        return any(thread.name in names and thread.is_alive() for thread in self._jobs)

    def settle(self, patience_s: float) -> None:
        """Wait until the jobs are done, or this long."""
        deadline = time.monotonic() + patience_s
        for thread in self._jobs:
            thread.join(max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """Write what is left. Nothing is written afterwards."""
        self._over.set()
        self._thread.join()
        for writer in self._writers.values():
            with suppress(OSError):
                writer.close()

    def _flush(self) -> None:
        """Write what is there, now."""
        while self._lines:
            path, line = self._lines.popleft()
            # A line that cannot be written is lost: there is nobody to tell.
            with suppress(OSError):
                self._writers[path].append(line)

    def _run(self) -> None:
        while not self._over.wait(TICK_S):
            self._listen()
            self._flush()
        self._listen()
        self._flush()
