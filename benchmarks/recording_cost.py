"""What recording costs a PyTorch loop at the recorder's default settings: step time recorded against step time not.

    python benchmarks/recording_cost.py [--seconds 240] [--limit 1.01]
    torchrun --nproc-per-node 2 benchmarks/recording_cost.py --parallel fsdp2

One process group trains one model throughout. Segments of a few seconds are recorded or not, in pairs of a random
order, so that what drifts on the machine is in both. A recorded segment goes on until no process reads a sample any
more: what a sample costs is in it to the end. What the recorder's thread does in segments that are not recorded is
taken off them. Prints the ratio of mean step times with the bound that it is below with 95% confidence, by a bootstrap
over the pairs; those with a sample and those without are drawn apart, for the recorder sets how many there are. Exits
with 1 where the bound is above the limit.
"""

import argparse
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from meshwright.record import Span, Step, open_run, read_events
from meshwright.trace import Recording, record

sys.path.insert(0, str(Path(__file__).parent / "programs"))

from bare_loop import WAYS, clip, plain_pass, split, start
from common import LLAMA_1B, Sequences, Shape, inputs_and_targets
from decoder import Decoder

# Some 200 ms a step on two cores: steps of a model for GPUs are no shorter.
CPU_SHAPE = Shape(layers=6, dim=256, heads=8, kv_heads=4, feed_forward=1024, vocabulary=4096)
WARM_UP_STEPS = 10
FEWEST_STEPS = 5
# So many different batches are trained on in turn.
BATCHES = 8
ROUNDS = 10_000
# Samples without which nothing can be said of their cost.
FEWEST_SAMPLES = 2


class Pair(NamedTuple):
    """Two segments, one after the other in some order: seconds and steps of each.

    sampled: in the recorded one a step was profiled, or its FLOPs counted.
    """

    recorded_s: float
    recorded_steps: int
    plain_s: float
    plain_steps: int
    sampled: bool


class Loop:
    """A bare loop over one model, on this rank."""

    def __init__(self, options: argparse.Namespace, rank: int, ranks: int, device: torch.device) -> None:
        self.options, self.device = options, device
        torch.manual_seed(0)
        autocast = torch.bfloat16 if options.precision == "bf16" and options.parallel != "fsdp2" else None
        with device:
            decoder = Decoder(options.shape, options.sequence, autocast=autocast)
        self.model = split(decoder, options, ranks, device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, fused=True)
        data = Sequences(BATCHES * options.microbatch * ranks, options.sequence + 1)
        own = range(rank * BATCHES * options.microbatch, (rank + 1) * BATCHES * options.microbatch)
        samples = [data[index] for index in own]
        starts = range(0, len(samples), options.microbatch)
        self.batches = [inputs_and_targets(samples[at : at + options.microbatch]) for at in starts]

    def step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        """One step."""
        tokens, targets = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        plain_pass(self.model, tokens, targets, self.options)
        clip(self.model, across_stages=False)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self, steps: int, recording: Recording | None) -> float:
        """A segment, recorded or not; its seconds, from where all ranks are ready to where all are done."""
        chosen = [self.batches[step % BATCHES] for step in range(steps)]
        self.meet()
        began = time.perf_counter()
        for batch in recording.steps(chosen) if recording else chosen:
            self.step(batch)
        self.meet()
        return time.perf_counter() - began

    def meet(self) -> None:
        """All ranks and their devices are here."""
        if dist.is_initialized():
            dist.barrier()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def anywhere(self, value: float) -> float:
        """The largest of all ranks' values."""
        found = torch.tensor(value, dtype=torch.float64, device=self.device)
        if dist.is_initialized():
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found.item()


def measure(loop: Loop, recording: Recording, seconds: float, steps: int) -> list[Pair]:
    """Pairs of segments of at least so many steps for so many seconds."""
    clock = time.pthread_getcpuclockid(next(t.ident for t in threading.enumerate() if t.name == "meshwright") or 0)
    order = random.Random(0)
    until = time.monotonic() + seconds
    pairs: list[Pair] = []
    # Where pairs begin and end, in recorded steps.
    bounds = [0]
    while loop.anywhere(float(time.monotonic() < until)):
        took = {True: 0.0, False: 0.0}
        done = {True: 0, False: 0}
        for recorded in order.sample((True, False), 2):
            used = time.clock_gettime(clock)
            going = 1.0
            while going:
                took[recorded] += loop.run(steps, recording if recorded else None)
                done[recorded] += steps
                going = loop.anywhere(float(recorded and reading()))
            if not recorded:
                took[False] -= time.clock_gettime(clock) - used
        bounds.append(bounds[-1] + done[True])
        pairs.append(Pair(took[True], done[True], took[False], done[False], False))
    recording.close()
    loop.meet()
    profiled = profiled_steps(recording)
    return [
        pair._replace(sampled=any(begin <= step < end for step in profiled))
        for pair, (begin, end) in zip(pairs, pairwise(bounds), strict=True)
    ]


def reading() -> bool:
    """Whether a sample of this rank is still being read, in whose process ever."""
    return any(thread.name in ("count", "sample") for thread in threading.enumerate())


def profiled_steps(recording: Recording) -> set[int]:
    """Steps before which the recorder turned its profiler on or off."""
    lines = read_events(open_run(recording.folder.path), recording.attempt).get(recording.rank, [])
    return {line.step for line in lines if isinstance(line, Span) and line.name == "measurement"}


def ratio_of(pairs: Sequence[Pair]) -> float:
    """Mean step time recorded over mean step time not."""
    recorded = sum(pair.recorded_s for pair in pairs) / sum(pair.recorded_steps for pair in pairs)
    return recorded / (sum(pair.plain_s for pair in pairs) / sum(pair.plain_steps for pair in pairs))


def upper_bound(pairs: Sequence[Pair]) -> float:
    """The ratio that the true one is below with 95% confidence."""
    draw = random.Random(0)
    kinds = [[pair for pair in pairs if pair.sampled is sampled] for sampled in (True, False)]
    found = sorted(
        ratio_of([pair for kind in kinds for pair in draw.choices(kind, k=len(kind)) if kind]) for _ in range(ROUNDS)
    )
    return found[round(0.95 * ROUNDS)]


def report(pairs: Sequence[Pair], recording: Recording, ranks: int, options: argparse.Namespace) -> int:
    """Print what was found; the exit code."""
    run = read_events(open_run(recording.folder.path), recording.attempt)
    samples = sum(isinstance(line, Step) for line in run[0])
    plain_s = sum(pair.plain_s for pair in pairs) / sum(pair.plain_steps for pair in pairs)
    without = [pair for pair in pairs if not pair.sampled]
    steps = sum(pair.recorded_steps for pair in pairs)
    over_s = sum(pair.recorded_s - pair.recorded_steps * plain_s for pair in pairs if pair.sampled)
    ratio, bound = ratio_of(pairs), upper_bound(pairs)
    shown = {
        "program": f"{options.parallel}, {ranks} of {torch.get_num_threads()} threads",
        "pairs of segments": f"{len(pairs)}, {len(pairs) - len(without)} with a profiled step",
        "steps": f"{steps} recorded, {sum(pair.plain_steps for pair in pairs)} not",
        "sampled steps": f"{samples}, and one whose FLOPs were counted",
        "a step that is not recorded": f"{plain_s * 1e3:.2f} ms",
        "ratio where none is profiled": f"{ratio_of(without):.4f}" if without else "no such pair",
        "beyond, where one is": f"{over_s * 1e3:.0f} ms in all, {over_s / (steps * plain_s):.2%} of what is recorded",
        "ratio": f"{ratio:.4f}, below {bound:.4f} with 95% confidence",
    }
    for name, text in shown.items():
        print(f"{name:<30}{text}")
    if samples < FEWEST_SAMPLES:
        print(f"too few sampled steps: --seconds {2 * options.seconds:.0f} or more")
        return 1
    return int(bound > options.limit)


def read_options() -> argparse.Namespace:
    """The command line."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="What recording costs.")
    parser.add_argument("--parallel", choices=[way for way in WAYS if way in ("none", "ddp", "fsdp2")], default="none")
    parser.add_argument("--seconds", type=float, default=240.0, help="how long to measure")
    parser.add_argument("--segment-s", type=float, default=5.0 if cuda else 3.0, help="seconds of a segment")
    parser.add_argument("--limit", type=float, default=1.01, help="of the ratio's bound")
    parser.add_argument("--run", type=Path, help="keep the run folder, here")
    options = parser.parse_args()
    options.shape = LLAMA_1B if cuda else CPU_SHAPE
    options.sequence, options.microbatch = (4096, 4) if cuda else (128, 4)
    options.precision = "bf16" if cuda else "fp32"
    return options


def main() -> None:
    """Measure and print."""
    options = read_options()
    rank, ranks, device = start()
    if (options.parallel == "none") != (ranks == 1):
        sys.exit(f"--parallel {options.parallel} and {ranks} processes: none is for one, the others are for several")
    loop = Loop(options, rank, ranks, device)
    # All is allocated afterwards.
    step_s = min(loop.run(1, None) for _ in range(WARM_UP_STEPS))
    steps = max(FEWEST_STEPS, round(options.segment_s / loop.anywhere(step_s)))
    with tempfile.TemporaryDirectory() as temporary:
        folder = [options.run or Path(temporary) / "run"]
        if dist.is_initialized():
            dist.broadcast_object_list(folder)
        recording = record(folder[0], loop.model, loop.optimizer)
        pairs = measure(loop, recording, options.seconds, steps)
        code = report(pairs, recording, ranks, options) if rank == 0 else 0
        loop.meet()
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    main()
