"""Speed, memory and account of a real training run on this machine's GPUs, one run a layout.

    python benchmarks/training_gpu.py [--job examples/llama-1b.toml] [--steps 25] [--same-batch] [--output FOLDER]

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
from pathlib import Path

from meshwright.explain import explain_run
from meshwright.plan import local_cluster
from meshwright.record import open_run, read_metrics
from meshwright.spec import Job, count_flops
from meshwright.spec.decode import read_job

# Steps whose mean loss a row shows.
LAST = 10


def layouts(gpus: int) -> dict[str, list[str]]:
    """Settings by name: one GPU, and on several each way to share the data."""
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


def same_batch(gpus: int) -> dict[str, list[str]]:
    """Settings by name: every layout on the same samples, so that their losses can be compared; what differs between
    the first two, one process with other microbatches, is rounding."""
    spread = ["layout.shard=1", f"layout.tensor={gpus}"]
    found = {
        "one GPU": ["layout.shard=1"],
        "one GPU, microbatch 4": ["layout.shard=1", "layout.microbatch=4"],
    }
    if gpus > 1:
        found |= {
            f"shard {gpus}": [],
            f"replica {gpus}": ["layout.shard=1", f"layout.replica={gpus}"],
            f"tensor {gpus}": spread,
            f"tensor {gpus}, async": [*spread, "layout.async_tensor=true"],
            f"shard {gpus}, recompute selective": ["layout.recompute=selective"],
            f"shard {gpus}, recompute full": ["layout.recompute=full"],
        }
    return {name: [*settings, f"data.global_batch={8 * gpus}"] for name, settings in found.items()}


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
    memory = metrics[-2].memory_bytes / 2**30
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
    parser.add_argument("--job", type=Path, default=Path("examples/llama-1b.toml"))
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--same-batch", action="store_true", help="every layout on the same samples, losses compared")
    parser.add_argument("--only", default="", help="run the layouts whose name contains this")
    parser.add_argument("--output", type=Path, help="keep each run's folder here")
    options = parser.parse_args()
    gpus = local_cluster(1).devices
    job = read_job(options.job, local=lambda processes: local_cluster(processes))
    if job.cluster.device.kind != "cuda":
        sys.exit("error: no GPU here; nearest that works: benchmarks/step_overhead.py")
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        chosen = same_batch(gpus) if options.same_batch else layouts(gpus)
        for name, settings in chosen.items():
            if options.only not in name:
                continue
            try:
                path = train(options.job, name, [*settings, f"run.steps={options.steps}"], Path(temporary))
            except subprocess.CalledProcessError as error:
                lines.append(columns(name, [f"exit {error.returncode}"]))
                continue
            lines.append(row(name, path))
            print(lines[-1], flush=True)
            subprocess.run([sys.executable, "-m", "meshwright", "explain", str(path)], check=True)
            if options.output:
                shutil.copytree(path, options.output / path.name)
    print(f"\n{job.model.name}, sequence {job.data.sequence}, {job.layout.precision}, on {job.cluster.device.name}")
    print(columns("layout", ["ms/step", "tok/s/GPU", "TFLOP/s", "MFU", "GiB", "other", "plan", "loss"]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
