"""How far tokenising is: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

# Seconds between two plain lines; what takes less says nothing.
PLAIN_EVERY_S = 5.0


class TokenisingProgress:
    """Shows bytes of text done out of all. Standard error, because the commands that tokenise print other things."""

    def __init__(self, total_bytes: int, done_bytes: int = 0) -> None:
        self._total, self._done, self._first = total_bytes, done_bytes, done_bytes
        self._began = self._shown = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("tokenising"), BarColumn(bar_width=24), DownloadColumn(), TransferSpeedColumn())
            console = Console(stderr=True, highlight=False)
            self._bar = Progress(*columns, TimeRemainingColumn(), TextColumn("left"), console=console, transient=True)
            self._task = self._bar.add_task("tokenising", total=total_bytes, completed=done_bytes)

    def __enter__(self) -> "TokenisingProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, more_bytes: int) -> None:
        """Some more is done."""
        self._done += more_bytes
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
            return
        now = time.monotonic()
        if now - self._shown >= PLAIN_EVERY_S:
            self._shown = now
            speed = (self._done - self._first) / (now - self._began)
            left_s = (self._total - self._done) / speed if speed else 0.0
            done = f"{self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB"
            print(f"tokenised {done}  {speed / 1e6:.1f} MB/s  {left_s:,.0f} s left", file=sys.stderr, flush=True)
