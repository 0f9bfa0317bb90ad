"""Speed, memory and account of a real training run on this machine's GPUs, one run a layout.

    python benchmarks/training_gpu.py [--table NAME] [--job JOB] [--steps 25] [--only TEXT] [--output FOLDER]

Each layout is trained by the command itself, in processes of its own; the table is read from the run folders. A row
is one run: compare rows of one table only, and expect a few per cent between machines. TFLOP/s counts model FLOPs
as docs/counting.md does.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, get_args

from meshwright.explain import explain_run
from meshwright.plan import local_cluster
from meshwright.record import open_run, read_metrics
from meshwright.spec import ContextForm, Job, Offload, Schedule, count_flops
from meshwright.spec.decode import read_job

# Settings by the layout's name.
Rows = dict[str, list[str]]

# Steps whose mean loss a row shows.
LAST = 10


def throughput(gpus: int) -> Rows:
    """One GPU, and on several each way to share the data."""
    found = {"one GPU": ["layout.shard=1", "data.global_batch=8"]}
    if gpus > 1:
        batch = f"data.global_batch={8 * gpus}"
        found |= {f"shard {gpus}, zero {z}": [f"layout.shard={gpus}", f"layout.zero={z}", batch] for z in (3, 2)}
        found[f"replica {gpus}"] = ["layout.shard=1", f"layout.replica={gpus}", batch]
        twice = f"data.global_batch={16 * gpus}"
        found |= {
            f"shard {gpus}, zero {z}, accumulation 2": [f"layout.shard={gpus}", f"layout.zero={z}", twice]
            for z in (3, 1)
        }
    return found


def same_batch(gpus: int) -> Rows:
    """Every layout on the same samples, so that their losses can be compared; what differs between the first two, one
    process with other microbatches, is rounding."""
    found = {"one GPU": ["layout.shard=1"], "one GPU, microbatch 4": ["layout.shard=1", "layout.microbatch=4"]}
    if gpus > 1:
        spread = ["layout.shard=1", f"layout.tensor={gpus}"]
        found |= {
            f"shard {gpus}": [],
            f"replica {gpus}": ["layout.shard=1", f"layout.replica={gpus}"],
            f"tensor {gpus}": spread,
            f"tensor {gpus}, async": [*spread, "layout.async_tensor=true"],
            f"shard {gpus}, recompute selective": ["layout.recompute=selective"],
            f"shard {gpus}, recompute full": ["layout.recompute=full"],
        }
    return {name: [*settings, f"data.global_batch={8 * gpus}"] for name, settings in found.items()}


def model_axes(gpus: int) -> Rows:
    """Pipelines by each schedule, and both forms of context, on the samples of `same_batch`."""
    staged = ["layout.shard=1", f"layout.pipeline={gpus}", "layout.microbatch=2", "layout.zero=1"]
    shared = ["layout.shard=1", f"layout.context={gpus}"]
    found = {f"pipeline {gpus}, {name}": [*staged, f"layout.schedule={name}"] for name in get_args(Schedule)}
    found |= {f"context {gpus}, {form}": [*shared, f"layout.context_form={form}"] for form in get_args(ContextForm)}
    return {name: [*settings, f"data.global_batch={8 * gpus}"] for name, settings in found.items()}


def experts(gpus: int) -> Rows:
    """A mixture whose experts every rank gathers, or that ranks divide."""
    return {
        f"shard {gpus}": [f"layout.shard={gpus}"],
        f"shard {gpus}, expert {gpus}": [f"layout.shard={gpus}", f"layout.expert={gpus}"],
    }


def offload(gpus: int) -> Rows:
    """What the host's memory takes over."""
    return {f"shard {gpus}, offload {what}": [f"layout.offload={what}"] for what in get_args(Offload)}


# Of one GPU, to hold plans against (benchmarks/planned_runs.py): all on the same samples.
PLANNED = ["layout.shard=1", "data.held_out=0", "trace.every_steps=5"]


def one_gpu(_gpus: int) -> Rows:
    """A model that fits one GPU in most layouts."""
    sizes = {"microbatch 8": 8, "microbatch 4": 4, "microbatch 2": 2, "microbatch 1": 1}
    found = {name: [f"layout.microbatch={size}"] for name, size in sizes.items()}
    for again in ("selective", "full", "8"):
        found[f"microbatch 8, recompute {again}"] = ["layout.microbatch=8", f"layout.recompute={again}"]
    for again in ("selective", "full", "2"):
        found[f"microbatch 16, recompute {again}"] = ["layout.microbatch=16", f"layout.recompute={again}"]
    for what in ("optimizer", "parameters"):
        found[f"microbatch 8, offload {what}"] = ["layout.microbatch=8", f"layout.offload={what}"]
    return {name: [*settings, *PLANNED] for name, settings in found.items()}


def one_gpu_8b(_gpus: int) -> Rows:
    """A model that fits one GPU only where most is recomputed, or its optimizer's states lie elsewhere."""
    model = ["model.name=llama3-8b", "layout.offload=optimizer", "data.global_batch=4", *PLANNED]
    found = {
        f"8B, offloaded, microbatch {size}, recompute {again}": [
            f"layout.microbatch={size}",
            f"layout.recompute={again}",
        ]
        for size, again in ((2, "selective"), (1, "none"), (1, "selective"), (2, "11"), (4, "20"), (4, "full"))
    }
    alone = ["layout.microbatch=1", "layout.recompute=full", "data.global_batch=1", "layout.offload=none"]
    return {name: [*model, *settings] for name, settings in (found | {"8B, recompute full": alone}).items()}


class Table(NamedTuple):
    """Rows that go on one table, and the job that they change."""

    rows: Callable[[int], Rows]
    job: str = "examples/llama-1b.toml"


TABLES = {
    "throughput": Table(throughput),
    "same-batch": Table(same_batch),
    "model-axes": Table(model_axes),
    "experts": Table(experts, "examples/mixture.toml"),
    "offload": Table(offload),
    "one-gpu": Table(one_gpu),
    "one-gpu-8b": Table(one_gpu_8b),
}


def train(job: Path, name: str, settings: list[str], folder: Path) -> Path:
    """Run the command; returns the run folder."""
    run = name.replace(",", "").replace(" ", "-")
    given = [*settings, f"run.name={run}", f"run.folder={folder}", "checkpoint.at_end=false"]
    command = [sys.executable, "-m", "meshwright", "train", str(job), *(w for s in given for w in ("--set", s))]
    subprocess.run(command, check=True)
    return folder / run


def row(name: str, path: Path) -> str:
    """A run as a line of the table."""
    folder = open_run(path)
    explanation = explain_run(folder)
    job = explanation.job
    assert isinstance(job, Job)
    metrics = read_metrics(folder)[0]
    step_s = statistics.median(line.step_s for line in metrics[5:])
    ranks = job.layout.world_size
    tokens = job.data.global_batch * job.data.sequence / step_s / ranks
    flops = count_flops(job.model, job.data.sequence).training() * job.data.global_batch / step_s / ranks
    # Not the last line: the evaluation after the last step is outside the steps.
    memory = (metrics[-2].memory_bytes or 0.0) / 2**30
    measured, predicted = explanation.step, explanation.prediction
    other = f"{measured.account.other / measured.wall_s:.1%}" if measured else "-"
    plan = f"{predicted.step_s / step_s - 1:+.0%}" if predicted else "-"
    mfu = flops / job.cluster.device.peak_flops_per_s(job.layout.precision)
    loss = statistics.mean(line.loss for line in metrics[-LAST:] if line.loss is not None)
    cells = [
        f"{step_s * 1e3:.1f}",
        f"{tokens:,.0f}",
        f"{flops / 1e12:.1f}",
        f"{mfu:.1%}",
        f"{memory:.1f}",
        other,
        plan,
        f"{loss:.4f}",
    ]
    return columns(name, cells)


def columns(name: str, cells: list[str]) -> str:
    """A line of the table; the heading is one too."""
    return f"{name:<32}" + "".join(f"{cell:>10}" for cell in cells)


def main() -> None:
    """Run every layout and print the table."""
    parser = argparse.ArgumentParser(description="Train on GPUs, one run a layout.")
    parser.add_argument("--table", choices=list(TABLES), default="throughput")
    parser.add_argument("--job", type=Path, help="change this job, not the table's own")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--only", default="", help="run the layouts whose name contains this")
    parser.add_argument("--output", type=Path, help="keep each run's folder here")
    options = parser.parse_args()
    gpus = local_cluster(1).devices
    table = TABLES[options.table]
    path = options.job or Path(table.job)
    job = read_job(path, local=lambda processes: local_cluster(processes))
    if job.cluster.device.kind != "cuda":
        sys.exit("error: no GPU here; nearest that works: benchmarks/step_overhead.py")
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, settings in table.rows(gpus).items():
            if options.only not in name:
                continue
            try:
                run = train(path, name, [*settings, f"run.steps={options.steps}"], Path(temporary))
            except subprocess.CalledProcessError as error:
                lines.append(columns(name, [f"exit {error.returncode}"]))
                continue
            lines.append(row(name, run))
            print(lines[-1], flush=True)
            subprocess.run([sys.executable, "-m", "meshwright", "explain", str(run)], check=True)
            if options.output:
                shutil.copytree(run, options.output / run.name)
    print(f"\n{job.model.name}, sequence {job.data.sequence}, {job.layout.precision}, on {job.cluster.device.name}")
    print(columns("layout", ["ms/step", "tok/s/GPU", "TFLOP/s", "MFU", "GiB", "other", "plan", "loss"]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
