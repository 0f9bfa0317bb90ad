"""The torch side of `meshwright verify`: one process's run, the layout's on ranks of its own, and what they gave."""

from pathlib import Path

import msgspec
import torch

from meshwright.data import prepare
from meshwright.parallel import start_distributed, stop_distributed
from meshwright.record import RunFolder, replace_text
from meshwright.record.verification import RankReport, Trial, write_trial
from meshwright.spec import Job
from meshwright.spec.decode import read_job
from meshwright.train.agent import start_ranks
from meshwright.train.worker import leave_word, no_machine, settle_process
from meshwright.verify.alone import measure_angle, train_alone
from meshwright.verify.layout import run_layout

TRIAL_FILE = "trial.json"
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
    # A rounding precision is judged by how far it takes one process from fp32, so fp32 is what everything is held to.
    reference = train_alone(in_fp32(job), device, folder.path / REFERENCE_FILE)
    angle = measure_angle(job, device) if job.layout.precision != "fp32" else None
    code = start_ranks(folder, attempt, job, verify_rank, (run, attempt))
    if code:
        return code
    paths = (report_path(folder, rank) for rank in range(job.layout.world_size))
    ranks = [msgspec.json.decode(path.read_bytes(), type=RankReport) for path in paths]
    bound = BOUNDS[job.cluster.device.kind]
    write_trial(folder.path / TRIAL_FILE, Trial(job=job, bound=bound, angle=angle, reference=reference, ranks=ranks))
    return 0


def verify_rank(run: str, attempt: int) -> None:
    """A rank of the layout, started by the agent."""
    folder = RunFolder(Path(run))
    with leave_word(folder, attempt):
        job = read_job(folder.job, local=no_machine)
        settle_process(job)
        device = start_distributed(job.cluster)
        report = run_layout(job, folder, attempt, device, folder.path / REFERENCE_FILE)
        replace_text(report_path(folder, report.rank), msgspec.json.encode(report).decode())
    stop_distributed()


def report_path(folder: RunFolder, rank: int) -> Path:
    """Where a rank leaves what it saw."""
    return folder.path / f"rank-{rank}.json"


def in_fp32(job: Job) -> Job:
    """The job in fp32."""
    return msgspec.structs.replace(job, layout=msgspec.structs.replace(job.layout, precision="fp32"))
