"""The torch side of `meshwright verify`: one process's run, the layout's on ranks of its own, and what they gave."""

from pathlib import Path

import torch

from meshwright.data import prepare
from meshwright.parallel import start_distributed, stop_distributed
from meshwright.record import RunFolder
from meshwright.record.verification import Trial, read_reports, write_report, write_trial
from meshwright.spec.decode import read_job
from meshwright.train.agent import start_ranks
from meshwright.train.worker import leave_word, no_machine, settle_process
from meshwright.verify.alone import train_alone
from meshwright.verify.layout import run_layout

REFERENCE_FILE = "reference.safetensors"

# Relative differences that are round-off in fp32, by kind of device. A GPU sums in other orders in other shapes.
BOUNDS = {"cpu": 1e-5, "cuda": 1e-4}


def verify_run(run: str, attempt: int) -> int:
    """Run the folder's job in one process and in its layout, and write the trial. Returns an exit code."""
    folder = RunFolder(Path(run))
    job = read_job(folder.job, local=no_machine)
    prepare(job.data)
    torch.set_num_threads(1)
    device = torch.device(job.cluster.device.kind, 0) if job.cluster.device.kind == "cuda" else torch.device("cpu")
    reference = train_alone(job, device, folder.path / REFERENCE_FILE)
    code = start_ranks(folder, attempt, job.layout.world_size, verify_rank, (run, attempt))
    if code:
        return code
    ranks = read_reports(folder, job.layout.world_size)
    write_trial(folder, Trial(job=job, bound=BOUNDS[job.cluster.device.kind], reference=reference, ranks=ranks))
    return 0


def verify_rank(run: str, attempt: int) -> None:
    """A rank of the layout, started by the agent."""
    folder = RunFolder(Path(run))
    with leave_word(folder, attempt):
        job = read_job(folder.job, local=no_machine)
        settle_process(job)
        device = start_distributed(job.cluster)
        write_report(folder, run_layout(job, folder, attempt, device, folder.path / REFERENCE_FILE))
    stop_distributed()
