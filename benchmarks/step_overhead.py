"""Step time of the trainer in one CPU process against a bare PyTorch loop over the same model and samples.

    python benchmarks/step_overhead.py [--segments 12] [--steps 5]

Both sides run in one process, in turn, a few steps each: what disturbs the machine disturbs both. The trainer is
the real loop, from `train`, with its mesh, sharding, annotations and metrics; the bare loop is torch and nothing
else. Prints the ratio of medians and a bootstrap interval.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from meshwright.account import MemoryAccount, StepAccount
from meshwright.data import open_stream
from meshwright.models import build_model, initialize_
from meshwright.parallel import start_distributed, stop_distributed
from meshwright.plan import local_cluster
from meshwright.record import Prediction, create_run, start_attempt
from meshwright.spec import Job
from meshwright.spec.decode import encode_job, read_job
from meshwright.train import loop
from meshwright.train.setup import StopRequest, build_batches


class BareLoop:
    """AdamW on a plain model, batches made beforehand."""

    def __init__(self, job: Job, steps: int) -> None:
        stream = open_stream(job)
        self.model = build_model(job.model, device="cpu")
        initialize_(self.model, job.model, job.run.seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
        batches = (stream.batch(step, 0, job.data.global_batch) for step in range(steps))
        self.batches = [(torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets)) for batch in batches]

    def step(self, number: int) -> float:
        """One step; seconds."""
        began = time.perf_counter()
        tokens, targets = self.batches[number % len(self.batches)]
        logits = self.model(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item()
        return time.perf_counter() - began


class Interleaved:
    """The trainer's batches, with a segment of bare steps before every so many of the trainer's."""

    def __init__(self, inner: Any, bare: BareLoop, steps: int) -> None:
        self._inner, self._bare, self._segment = inner, bare, steps
        self._returned: float | None = None
        self._waited = 0.0
        self.ours: list[float] = []
        self.bares: list[float] = []

    def next(self, step: int) -> Any:
        """The trainer's microbatches; everything between two calls is the trainer's step."""
        now = time.perf_counter()
        if self._returned is not None:
            self.ours.append(now - self._returned + self._waited)
        if step % self._segment == 0:
            self.bares += [self._bare.step(step + i) for i in range(self._segment)]
        asked = time.perf_counter()
        microbatches = self._inner.next(step)
        self._returned = time.perf_counter()
        self._waited = self._returned - asked
        return microbatches

    def close(self) -> None:
        """End the trainer's loader."""
        self._inner.close()


def measure(job: Job, folder: Path, segment: int) -> tuple[list[float], list[float]]:
    """Seconds of each step of the trainer and of the bare loop, the first segment of both left out."""
    run = create_run(folder / "run", encode_job(job))
    blank = Prediction(layout=job.layout, step=StepAccount(), memory=MemoryAccount(), step_s=1.0, tokens_per_s=1.0)
    attempt = start_attempt(run, blank)
    bare = BareLoop(job, segment)
    interleaved: list[Interleaved] = []

    def build(*arguments: Any) -> Interleaved:
        interleaved.append(Interleaved(build_batches(*arguments), bare, segment))
        return interleaved[0]

    with mock.patch.object(loop, "build_batches", build):
        loop.train(job, run, attempt, start_distributed(job.cluster), StopRequest(), began_s=time.time())
    stop_distributed()
    return interleaved[0].ours[segment:], interleaved[0].bares[segment:]


def bootstrap(ours: list[float], bares: list[float], rounds: int = 2000) -> tuple[float, float]:
    """95% interval of the ratio of medians."""
    draw = random.Random(0)
    ratios = sorted(
        statistics.median(draw.choices(ours, k=len(ours))) / statistics.median(draw.choices(bares, k=len(bares)))
        for _ in range(rounds)
    )
    return ratios[int(0.025 * rounds)], ratios[int(0.975 * rounds)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="The trainer against a bare loop.")
    parser.add_argument("--segments", type=int, default=12)
    parser.add_argument("--steps", type=int, default=5, help="steps of each side in a segment")
    parser.add_argument("--job", type=Path, default=Path("examples/quickstart.toml"))
    options = parser.parse_args()
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29417",
    }
    with tempfile.TemporaryDirectory() as temporary:
        settings = [
            f"run.steps={options.segments * options.steps}",
            "cluster.processes=1",
            "layout.microbatch=32",
            "trace.every_steps=0",
            "checkpoint.every_steps=0",
        ]
        job = read_job(options.job, settings, local=lambda processes: local_cluster(processes))
        ours, bares = measure(job, Path(temporary), options.steps)
    low, high = bootstrap(ours, bares)
    ratio = statistics.median(ours) / statistics.median(bares)
    print(f"trainer   median {statistics.median(ours) * 1e3:8.1f} ms  of {len(ours)} steps")
    print(f"bare loop median {statistics.median(bares) * 1e3:8.1f} ms  of {len(bares)} steps")
    print(f"ratio {ratio:.3f}  (95% interval {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
