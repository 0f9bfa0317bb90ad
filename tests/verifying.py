"""A layout on forked ranks beside one process, as `meshwright verify` runs them, without its processes."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import msgspec
import torch
from ranks import run_ranks
from training import new_run

from meshwright.explain.verification import Verdict, explain_trial
from meshwright.parallel import start_distributed, stop_distributed
from meshwright.record import RunFolder
from meshwright.record.verification import Reference, Trial, read_reports, read_trial, write_report, write_trial
from meshwright.spec import Job
from meshwright.verify.agent import BOUNDS
from meshwright.verify.alone import train_alone
from meshwright.verify.layout import run_layout

Fault = Callable[[Job], AbstractContextManager[object]]


class References:
    """One process's run of a model and its samples, made once and compared with every layout of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[bytes, tuple[Reference, Path]] = {}

    def of(self, job: Job) -> tuple[Reference, Path]:
        """The job's reference, and the file of its tensors."""
        key = msgspec.json.encode(
            (job.model, job.data, job.optimizer, job.layout.precision, job.run.seed, job.run.steps)
        )
        if key not in self._known:
            written = self._folder / f"reference-{len(self._known)}.safetensors"
            self._known[key] = (train_alone(job, torch.device("cpu"), written), written)
        return self._known[key]


def no_fault(_job: Job) -> AbstractContextManager[object]:
    """The product as it is."""
    return nullcontext()


def verify_rank(job: Job, folder: RunFolder, attempt: int, reference: Path, fault: Fault) -> None:
    """One rank's whole life, with a fault planted in it."""
    torch.set_num_threads(1)
    device = start_distributed(job.cluster)
    with fault(job):
        write_report(folder, run_layout(job, folder, attempt, device, reference))
    stop_distributed()


def verdict_of(job: Job, references: References, fault: Fault = no_fault) -> Verdict:
    """Train the job in its layout and judge it against one process."""
    reference, tensors = references.of(job)
    folder, attempt = new_run(job)
    run_ranks(job.layout.world_size, verify_rank, job, folder, attempt, tensors, fault)
    ranks = read_reports(folder, job.layout.world_size)
    write_trial(folder, Trial(job=job, bound=BOUNDS["cpu"], reference=reference, ranks=ranks))
    return explain_trial(read_trial(folder))


def assert_agrees(verdict: Verdict) -> None:
    """Fail with every row that was compared."""
    rows = "\n".join(f"{row.what}: {row.difference:.1e}, bound {row.bound:.0e} {row.where}" for row in verdict.rows)
    assert verdict.agrees, f"{rows}\n{verdict.cause}"
