"""Slow one rank by a known amount in every step and see where the measured account puts it.

    python benchmarks/slowed_rank.py [--ranks 2] [--seconds 0.1] [--job examples/quickstart.toml]

The last rank does nothing for that long before each step's forward pass: on a GPU its device spins (host sleep
would hide behind the work already launched), on a CPU its thread sleeps. Expected: the other ranks book the time as
`straggler`, blamed on the last rank; the last rank books it as its own, `inefficiency` (a spinning kernel is a slow
kernel) on a GPU and `host` on a CPU. A run without the delay comes first, to subtract.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.multiprocessing
from torch import Tensor

from meshwright.account import MemoryAccount, StepAccount
from meshwright.explain import Explanation, explain_run
from meshwright.parallel import start_distributed, stop_distributed
from meshwright.plan import local_cluster
from meshwright.record import Prediction, RunFolder, create_run, start_attempt
from meshwright.spec import Job
from meshwright.spec.decode import encode_job, read_job
from meshwright.train import loop
from meshwright.train.setup import StopRequest
from meshwright.train.worker import settle_process


def spin(device: torch.device, seconds: float, cycles_per_s: float) -> None:
    """Keep the device, or this thread, from doing anything else."""
    if device.type == "cuda":
        torch.cuda._sleep(int(seconds * cycles_per_s))
    else:
        time.sleep(seconds)


def spinning_rate(device: torch.device) -> float:
    """Cycles of torch.cuda._sleep in a second; 1 on a CPU, which does not need it."""
    if device.type == "cpu":
        return 1.0
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cycles = 10**9
    torch.cuda._sleep(cycles)
    start.record()
    torch.cuda._sleep(cycles)
    end.record()
    end.synchronize()
    return cycles / (start.elapsed_time(end) * 1e-3)


def run_rank(rank: int, job: Job, folder: Path, seconds: float) -> None:
    """One rank of the real loop, slowed if it is the last."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job.layout.world_size)}
    settle_process(job)
    device = start_distributed(job.cluster)
    rate = spinning_rate(device)

    forward = loop.Passes.forward

    def slowed(*arguments: Any) -> Tensor:
        if rank == job.layout.world_size - 1 and seconds:
            spin(device, seconds, rate)
        return forward(*arguments)

    with mock.patch.object(loop.Passes, "forward", slowed):
        loop.train(job, RunFolder(folder), 0, device, StopRequest(), began_s=time.time())
    stop_distributed()


def run(job: Job, folder: Path, seconds: float) -> Explanation:
    """Train and explain."""
    blank = Prediction(layout=job.layout, step=StepAccount(), memory=MemoryAccount(), step_s=1.0, tokens_per_s=1.0)
    created = create_run(folder, encode_job(job))
    start_attempt(created, blank)
    torch.multiprocessing.spawn(run_rank, (job, folder, seconds), job.layout.world_size)
    return explain_run(created)


def main() -> None:
    """Run twice and print what changed."""
    parser = argparse.ArgumentParser(description="Slow one rank by a known amount.")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.1)
    parser.add_argument("--job", type=Path, default=Path("examples/quickstart.toml"))
    options = parser.parse_args()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29431", "KINETO_LOG_LEVEL": "99"}
    settings = [
        "run.steps=24",
        "trace.every_steps=4",
        "checkpoint.at_end=false",
        f"layout.shard={options.ranks}",
        f"cluster.processes={options.ranks}",
        f"data.global_batch={8 * options.ranks}",
        "layout.microbatch=8",
    ]
    job = read_job(options.job, settings, local=lambda processes: local_cluster(processes))
    with tempfile.TemporaryDirectory() as temporary:
        before = run(job, Path(temporary) / "as-is", 0.0)
        after = run(job, Path(temporary) / "slowed", options.seconds)
    assert before.step is not None
    assert after.step is not None
    last = job.layout.world_size - 1
    print(
        f"\nrank {last} delayed by {options.seconds * 1e3:.1f} ms a step; each rank's account, slowed minus as-is, ms"
    )
    for rank, account in after.step.ranks.items():
        changes = ((name, seconds * 1e3) for name, seconds in (account - before.step.ranks[rank]).rows())
        print(f"rank {rank}: " + "  ".join(f"{name} {change:+.1f}" for name, change in changes if abs(change) >= 1.0))
    for rank, waits in after.step.blame.items():
        waited = ", ".join(f"{seconds * 1e3:.1f} ms for rank {culprit}" for culprit, seconds in waits.items())
        print(f"rank {rank} waited in the slowed run: {waited}")
    print(f"other: {before.step.poor_share:.2%} and {after.step.poor_share:.2%} of the step on the worst rank")


if __name__ == "__main__":
    main()
