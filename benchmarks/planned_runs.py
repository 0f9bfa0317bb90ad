"""Finished runs against what a plan says of them: step time, memory, and whether the layout named first is the best.

    python benchmarks/planned_runs.py RUN ... [--cluster FILE] [--accounts]

RUN: run folders, of this machine or another; `benchmarks/training_gpu.py --table one-gpu --output FOLDER` leaves some
there. FILE: what `meshwright calibrate` wrote on the machine that ran them, in the place of each job's own cluster.

Step: the median of a run's steps that were not profiled. Memory: the fullest rank's, as its account has it. Runs of one
model, sequence, batch and world size are compared with each other: the first choice is the layout that is predicted to
be the fastest of those that ran, and of one run alone there is none. Exit code 1 where a figure misses its bar.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from meshwright.account import Account, MemoryAccount, StepAccount
from meshwright.cli.machine import read
from meshwright.explain import explain_run
from meshwright.plan import predict
from meshwright.record import Prediction, open_run
from meshwright.spec import Job, SettingError

# Most that each figure may be: errors of steps and of memory, and how much slower the first choice is than the best.
BARS = {
    "step, median error": 0.05,
    "step, worst error": 0.10,
    "memory, worst error": 0.04,
    "first choice, slower than the best": 0.02,
}


class Ran(NamedTuple):
    """One run, measured and predicted."""

    name: str
    job: Job
    step_s: float
    account: StepAccount | None
    memory: MemoryAccount
    predicted: Prediction

    @property
    def step_error(self) -> float:
        """0.1: predicted a tenth longer than measured."""
        return self.predicted.step_s / self.step_s - 1

    @property
    def memory_error(self) -> float:
        """The same of its memory."""
        return self.predicted.memory.total() / self.memory.total() - 1

    @property
    def compared(self) -> tuple[object, ...]:
        """What is the same in runs that are compared."""
        data = self.job.data
        return self.job.model.name, data.sequence, data.global_batch, self.job.layout.world_size


def read_run(path: Path, cluster: str | None) -> Ran:
    """A run folder; cluster: a file in the place of the job's own."""
    folder = open_run(path)
    found = explain_run(folder)
    if found.step_s is None or found.memory.measured is None:
        sys.exit(f"error: {path}: no step time or no memory account; nearest that works: a run of 4 steps or more")
    job = read(folder.job, [], cluster)
    account = found.step.account if found.step else None
    return Ran(path.name, job, found.step_s, account, found.memory.measured, predict(job))


def figures(runs: Sequence[Ran]) -> dict[str, float]:
    """What BARS is about, as far as there are runs to tell."""
    groups: dict[tuple[object, ...], list[Ran]] = {}
    for run in runs:
        groups.setdefault(run.compared, []).append(run)
    slower = [
        min(group, key=lambda run: run.predicted.step_s).step_s / min(run.step_s for run in group) - 1
        for group in groups.values()
        if len(group) > 1
    ]
    errors = [abs(run.step_error) for run in runs]
    memory = [abs(run.memory_error) for run in runs]
    found = (statistics.median(errors), max(errors), max(memory), max(slower, default=None))
    return {name: value for name, value in zip(BARS, found, strict=True) if value is not None}


def columns(name: str, cells: Sequence[str]) -> str:
    """A line of the table; the heading is one too."""
    return f"{name:<48}" + "".join(f"{cell:>11}" for cell in cells)


def line(run: Ran) -> str:
    """A run as a line of the table."""
    low, high = run.predicted.step_interval_s
    cells = [
        f"{run.step_s * 1e3:.1f}",
        f"{run.predicted.step_s * 1e3:.1f}",
        f"{run.step_error:+.1%}",
        "yes" if low <= run.step_s <= high else "no",
        f"{run.memory.total() / 1e9:.1f}",
        f"{run.predicted.memory.total() / 1e9:.1f}",
        f"{run.memory_error:+.1%}",
    ]
    return columns(run.name, cells)


def account_lines(measured: Account, predicted: Account, unit: float) -> list[str]:
    """Both accounts, term by term: measured, predicted."""
    both = zip(measured.rows(), predicted.rows(), strict=True)
    return [columns(f"    {name}", [f"{a * unit:.1f}", f"{b * unit:.1f}"]) for (name, a), (_, b) in both if a or b]


def main() -> None:
    """Print the table and the figures."""
    parser = argparse.ArgumentParser(description="Finished runs against what a plan says of them.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--cluster", help="a calibrated cluster file, in the place of each job's cluster")
    parser.add_argument(
        "--accounts", action="store_true", help="show both accounts of each run, measured and predicted"
    )
    options = parser.parse_args()
    try:
        runs = [read_run(path, options.cluster) for path in options.runs]
    except SettingError as error:
        sys.exit(f"error: {error}")
    print(columns("run", ["ms/step", "predicted", "", "in 80%", "GB", "predicted", ""]))
    for run in runs:
        print(line(run))
        if options.accounts:
            if run.account:
                print("\n".join(account_lines(run.account, run.predicted.step, 1e3)))
            print("\n".join(account_lines(run.memory, run.predicted.memory, 1e-9)))
    print()
    found = figures(runs)
    for name, value in found.items():
        print(f"{name:<36}{value:>8.1%}   at most {BARS[name]:.0%}{'' if value <= BARS[name] else '   MISSED'}")
    sys.exit(any(value > BARS[name] for name, value in found.items()))


if __name__ == "__main__":
    main()
