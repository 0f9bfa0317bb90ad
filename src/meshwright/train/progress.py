"""The progress display: a live line on a terminal, plain lines elsewhere."""

import sys
import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from meshwright.record import Evaluation, Metrics, RunFolder
from meshwright.spec import Job

# Seconds between two plain lines.
PLAIN_EVERY_S = 5.0


class Display(Protocol):
    """What a reporter needs of a display."""

    def step(self, line: Metrics) -> None:
        """Show a step."""
        ...

    def evaluated(self, line: Evaluation) -> None:
        """Show a held-out loss."""
        ...

    def close(self, how: str) -> None:
        """Leave the terminal in order and say how the run ended."""
        ...


def build_display(job: Job, folder: RunFolder, first: int) -> Display:
    """The display for where standard output goes."""
    return LiveDisplay(job, folder, first) if sys.stdout.isatty() else PlainDisplay(job, folder, first)


def describe(line: Metrics) -> str:
    """A step in a few words, the same in both displays."""
    words = [f"loss {line.loss:.3f}"]
    if line.tokens_per_s is not None:
        words.append(f"{line.tokens_per_s:,.0f} tokens/s")
    if line.mfu is not None:
        words.append(f"MFU {line.mfu:.1%}")
    if line.memory_bytes is not None:
        words.append(f"{line.memory_bytes / 2**30:.2f} GiB")
    if line.expert_load is not None:
        words.append(f"fullest expert {line.expert_load:.1f}x")
    return "  ".join(words)


def describe_evaluation(line: Evaluation) -> str:
    """A held-out loss, beside what knowing one token back would leave uncertain."""
    loss = "not finite" if line.held_out_loss is None else f"{line.held_out_loss:.3f} nats per token"
    against = f" (bigram entropy of the corpus: {line.bigram_entropy:.3f})" if line.bigram_entropy is not None else ""
    return f"held-out loss after {line.step} steps: {loss}{against}"


def opening(job: Job, first: int) -> str:
    """What is about to run, and what comes first: it may take as long as many steps."""
    start = f"from step {first} " if first else ""
    line = f"training {job.run.name} {start}to step {job.run.steps}: {job.layout.label()} on {job.cluster.label()}"
    held_out = f"\nevaluating before step {first + 1}: up to {job.evaluation.sequences} held-out samples"
    return line + (held_out if job.data.held_out else "")


def ending(folder: RunFolder, how: str) -> str:
    """How it ended, and what to type next."""
    if how == "stopped":
        return f"stopped and saved; to go on: meshwright train --resume {folder.path}"
    return f"finished; where the time went: meshwright explain {folder.path}"


class PlainDisplay:
    """One line every few seconds."""

    def __init__(self, job: Job, folder: RunFolder, first: int) -> None:
        self._steps = job.run.steps
        self._folder = folder
        self._began = self._shown = time.monotonic()
        self._first = first
        print(opening(job, first), flush=True)

    def step(self, line: Metrics) -> None:
        """Print a line if the last one is old, and for the first and last step."""
        now = time.monotonic()
        done = line.step + 1
        if done in (self._first + 1, self._steps) or now - self._shown >= PLAIN_EVERY_S:
            self._shown = now
            left = (now - self._began) / (done - self._first) * (self._steps - done)
            print(f"step {done}/{self._steps}  {describe(line)}  {left:.0f} s left", flush=True)

    def evaluated(self, line: Evaluation) -> None:
        """Print a held-out loss."""
        print(describe_evaluation(line), flush=True)

    def close(self, how: str) -> None:
        """Print how it ended."""
        print(ending(self._folder, how), flush=True)


class LiveDisplay:
    """A bar that stays in place; held-out losses scroll above it."""

    def __init__(self, job: Job, folder: RunFolder, first: int) -> None:
        console = Console(highlight=False)
        console.print(opening(job, first))
        self._folder = folder
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
        )
        self._task = self._progress.add_task("starting", total=job.run.steps, completed=first)
        self._progress.start()

    def step(self, line: Metrics) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=line.step + 1, description=describe(line))

    def evaluated(self, line: Evaluation) -> None:
        """Print a held-out loss above the bar."""
        self._progress.console.print(describe_evaluation(line))

    def close(self, how: str) -> None:
        """End the bar and print how the run ended."""
        self._progress.stop()
        self._progress.console.print(ending(self._folder, how))
