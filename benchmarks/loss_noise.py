"""Is a layout's loss within the noise that one GPU shows against itself? Pairs of runs on the same samples, per seed.

    python benchmarks/loss_noise.py [--job examples/llama-1b.toml] [--seeds 5] [--steps 50] [--layouts tensor=2 shard=2]

For every seed one GPU trains the job twice, compiled and not compiled, with other microbatches too: the same
mathematics, rounded elsewhere, in the forward pass as well. Then every layout trains it. A line is one pair: the mean
loss of the last steps and the mean and largest difference of a step's loss from the first run's of that seed. A seed
sets the initial weights and the order of samples.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from meshwright.plan import local_cluster
from meshwright.record import open_run, read_metrics

# Steps whose mean loss a line shows.
LAST = 10

REFERENCE = ["layout.shard=1", "layout.microbatch=4"]
OTHERWISE = ["layout.shard=1", "layout.microbatch=2"]


def start(job: Path, folder: Path, name: str, settings: list[str], variables: dict[str, str]) -> subprocess.Popen[str]:
    """Start a run with these environment variables."""
    given = [*settings, f"run.name={name}", f"run.folder={folder}", "checkpoint.at_end=false", "data.held_out=0"]
    command = [sys.executable, "-m", "meshwright", "train", str(job), *(w for s in given for w in ("--set", s))]
    return subprocess.Popen(command, env=os.environ | variables, stdout=subprocess.DEVNULL, text=True)


def losses(folder: Path, name: str) -> list[float]:
    """A finished run's loss, step by step."""
    return [line.loss for line in read_metrics(open_run(folder / name))[0] if line.loss is not None]


def line(name: str, seed: int, own: list[float], reference: list[float]) -> str:
    """A pair of runs as a line of the table."""
    apart = [abs(a - b) for a, b in zip(own, reference, strict=True)]
    last = statistics.mean(own[-LAST:]), statistics.mean(reference[-LAST:])
    figures = f"{last[0]:>10.4f}{last[0] - last[1]:>+12.5f}{statistics.mean(apart):>12.5f}{max(apart):>12.5f}"
    return f"{name:<28}{seed:>6}{figures}"


def main() -> None:
    """Run all pairs and print the table."""
    parser = argparse.ArgumentParser(description="Hold layouts' losses against one GPU's own noise.")
    parser.add_argument("--job", type=Path, default=Path("examples/llama-1b.toml"))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--layouts", nargs="*", default=["tensor=2", "shard=2", "replica=2"])
    options = parser.parse_args()
    gpus = local_cluster(1).devices
    print(f"{'run':<28}{'seed':>6}{'loss':>10}{'from one':>12}{'mean step':>12}{'max step':>12}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for seed in range(1, options.seeds + 1):
            common = [f"run.steps={options.steps}", f"run.seed={seed}", f"data.global_batch={options.batch}"]
            settings = [*common, *REFERENCE]
            first = start(options.job, folder, f"one-{seed}", settings, {"CUDA_VISIBLE_DEVICES": "0"})
            if gpus == 1:
                first.wait()
            eager = {"CUDA_VISIBLE_DEVICES": str(gpus - 1), "TORCH_COMPILE_DISABLE": "1"}
            second = start(options.job, folder, f"otherwise-{seed}", [*common, *OTHERWISE], eager)
            if second.wait() or first.wait():
                sys.exit(1)
            reference = losses(folder, f"one-{seed}")
            print(line("one GPU, rounded otherwise", seed, losses(folder, f"otherwise-{seed}"), reference), flush=True)
            for layout in options.layouts:
                name = f"{layout.replace('=', '-')}-{seed}"
                if start(options.job, folder, name, [*common, *REFERENCE, f"layout.{layout}"], {}).wait():
                    sys.exit(1)
                print(line(layout.replace("=", " "), seed, losses(folder, name), reference), flush=True)


if __name__ == "__main__":
    main()
