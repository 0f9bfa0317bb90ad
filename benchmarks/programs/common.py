"""What the programs of this folder share: options, data, a clock for steps, and the profiler a user would take.

Nothing here knows Meshwright. The programs are what other people run; recording.py is where Meshwright is attached.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import Dataset

PROFILED_STEPS = 3
# The profiler's own start-up distorts the step after it: one step is traced and thrown away.
PROFILER_WARMUP_STEPS = 1


class Shape(NamedTuple):
    """The decoder's numbers, in the words of its papers."""

    layers: int
    dim: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int


LLAMA_1B = Shape(layers=16, dim=2048, heads=32, kv_heads=8, feed_forward=8192, vocabulary=128256)
SMALL = Shape(layers=4, dim=128, heads=4, kv_heads=2, feed_forward=512, vocabulary=512)


def options_parser(description: str) -> argparse.ArgumentParser:
    """The options of every program; a program adds its own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--microbatch", type=int, help="sequences a rank takes at once (default 4)")
    parser.add_argument("--sequence", type=int, help="tokens of a sequence (default 4096; 64 with --small)")
    parser.add_argument("--accumulate", type=int, default=1, help="microbatches of a rank in a step")
    parser.add_argument("--small", action="store_true", help="a model that two CPU processes train in seconds")
    parser.add_argument("--layers", type=int, help="another depth than the model's")
    parser.add_argument("--precision", choices=["bf16", "fp32"], help="default bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--workers", type=int, default=0, help="worker processes of the data loader")
    parser.add_argument("--profile", type=Path, help="folder for a torch.profiler trace a rank of the last 3 steps")
    parser.add_argument("--record", type=Path, help="run folder that Meshwright records into")
    parser.add_argument("--every-steps", type=int, help="a recorded sample each so many steps")
    parser.add_argument("--keep-traces", action="store_true", help="keep the traces of the recorded samples")
    parser.add_argument("--step-times", type=Path, help="file for the seconds of each step of rank 0, as JSON")
    causes = parser.add_argument_group("causes, added from outside the package")
    causes.add_argument("--delay-input", type=float, default=0, metavar="MS", help="the loader sleeps for each batch")
    causes.add_argument("--slow-rank", type=int, help="the rank that --slow-ms slows")
    causes.add_argument("--slow-ms", type=float, default=0, help="its sleep before each forward pass")
    causes.add_argument("--slow-kernels", action="store_true", help="keep its device busy instead of its host")
    causes.add_argument("--item", action="store_true", help="read one element of each forward pass's result")
    causes.add_argument("--items-per-step", type=int, default=0, help="read one element in this many layers, each step")
    causes.add_argument("--tiny-microbatches", action="store_true", help="the same tokens, one sequence at a time")
    causes.add_argument("--sleep", type=float, default=0, metavar="MS", help="every rank sleeps in mid-step")
    causes.add_argument("--even-steps", action="store_true", help="the causes that sleep do so in every other step")
    return parser


def settle(options: argparse.Namespace) -> argparse.Namespace:
    """Fill in the defaults that depend on each other, and refuse what would do nothing."""
    cuda = torch.cuda.is_available()
    shape = SMALL if options.small else LLAMA_1B
    options.shape = shape._replace(layers=options.layers or shape.layers)
    options.sequence = options.sequence or (64 if options.small else 4096)
    options.microbatch = options.microbatch or 4
    options.precision = options.precision or ("bf16" if cuda else "fp32")
    if options.tiny_microbatches:
        options.microbatch, options.accumulate = 1, options.microbatch * options.accumulate
    refused = {
        "--slow-rank and --slow-ms belong together": (options.slow_rank is None) != (not options.slow_ms),
        "--slow-kernels needs --slow-rank and a GPU": options.slow_kernels and not (options.slow_ms and cuda),
        "--even-steps needs --delay-input, --slow-rank or --sleep": (
            options.even_steps and not (options.delay_input or options.slow_ms or options.sleep)
        ),
        "--even-steps and --slow-kernels do not go together": options.even_steps and options.slow_kernels,
        "--even-steps needs --workers 0: others do not know the step": options.even_steps and options.workers > 0,
        f"--items-per-step is at most one a layer: {options.shape.layers}": (
            options.items_per_step > options.shape.layers
        ),
        f"--profile needs --steps of {PROFILED_STEPS + PROFILER_WARMUP_STEPS + 2} or more": (
            options.profile is not None and options.steps < PROFILED_STEPS + PROFILER_WARMUP_STEPS + 2
        ),
    }
    for reason, holds in refused.items():
        if holds:
            sys.exit(reason)
    return options


class Sequences(Dataset[Tensor]):
    """Arithmetic sequences over a few hundred symbols with a tenth of them replaced at random: learned in some steps,
    and made in microseconds, so that reading costs nothing unless it is delayed.
    """

    symbols = 256

    def __init__(self, count: int, tokens: int) -> None:
        self.count, self.tokens = count, tokens

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        draw = torch.Generator().manual_seed(index)
        start, stride = torch.randint(self.symbols, (2,), generator=draw).tolist()
        sequence = (start + stride * torch.arange(self.tokens)) % self.symbols
        noise = torch.randint(self.symbols, (self.tokens,), generator=draw)
        return torch.where(torch.rand(self.tokens, generator=draw) < 0.1, noise, sequence)


def delayed(
    collate: Callable[[list[Tensor]], Any], options: argparse.Namespace, clock: "StepClock"
) -> Callable[[list[Tensor]], Any]:
    """The collate function, late by as much as the options say."""
    if not options.delay_input:
        return collate

    def late(samples: list[Tensor]) -> Any:
        if not options.even_steps or clock.steps % 2 == 0:
            time.sleep(options.delay_input / 1e3)
        return collate(samples)

    return late


def inputs_and_targets(samples: list[Tensor]) -> tuple[Tensor, Tensor]:
    """A batch of a plain PyTorch loop: sequences of one token more than the model reads."""
    tokens = torch.stack(samples)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def huggingface_batch(samples: list[Tensor]) -> dict[str, Tensor]:
    """A batch of transformers, whose models shift the labels themselves."""
    tokens = torch.stack(samples)
    return {"input_ids": tokens, "labels": tokens}


class StepClock:
    """Marks the end of every optimizer step of the process, by torch's own hooks, whoever makes the step.

    A container of optimizers is an optimizer itself: only the outermost call counts.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []
        self._depth = 0
        self.steps = 0
        self.listeners: list[Callable[[], None]] = []
        register_optimizer_step_pre_hook(self._enter)
        register_optimizer_step_post_hook(self._leave)

    def _enter(self, _optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        self._depth += 1

    def _leave(self, _optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        self._depth -= 1
        if self._depth:
            return
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())
        self.steps += 1
        for listener in self.listeners:
            listener()

    def step_s(self) -> list[float]:
        """Seconds of each step but the first, from the end of one to the end of the next on the device."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if not self._cuda:
            return [after - before for before, after in pairs]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairs]


class Profiler:
    """torch.profiler as its users take it, with a note of what it cost. Without a folder it does nothing."""

    def __init__(self, options: argparse.Namespace, rank: int) -> None:
        self.folder: Path | None = options.profile
        self.rank = rank
        self.export_s = 0.0
        self.longest_call_s = 0.0
        self.schedule = {
            "wait": options.steps - PROFILED_STEPS - PROFILER_WARMUP_STEPS,
            "warmup": PROFILER_WARMUP_STEPS,
            "active": PROFILED_STEPS,
        }
        self.inner: Any = None

    def start(self) -> None:
        """Begin, where the program has no profiler of its own."""
        if self.folder:
            schedule = torch.profiler.schedule(**self.schedule, repeat=1)
            self.inner = torch.profiler.profile(schedule=schedule, on_trace_ready=self.export)
            self.inner.start()

    def step(self) -> None:
        """A step of the program ended."""
        if self.inner is None:
            return
        began = time.perf_counter()
        self.inner.step()
        self.longest_call_s = max(self.longest_call_s, time.perf_counter() - began - self.export_s)

    def stop(self) -> None:
        """End a profiler that start() began."""
        if self.inner is not None:
            self.inner.stop()

    def export(self, profile: Any) -> None:
        """Write this rank's trace."""
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        profile.export_chrome_trace(str(self.folder / f"rank-{self.rank}.json"))
        self.export_s = time.perf_counter() - began


def finish(
    options: argparse.Namespace, rank: int, clock: StepClock, tokens_per_step: int, **more: float | int | str | None
) -> None:
    """Write the step times and print one line about the run, on rank 0."""
    step_s = clock.step_s()
    if rank:
        return
    if options.step_times:
        options.step_times.parent.mkdir(parents=True, exist_ok=True)
        options.step_times.write_text(json.dumps({"step_s": step_s, "tokens_per_step": tokens_per_step}))
    # A quarter of the steps to warm up; the profiled ones and their warm-up step are slower.
    profiled = PROFILED_STEPS + PROFILER_WARMUP_STEPS if options.profile else 0
    counted = step_s[options.steps // 4 : len(step_s) - profiled] or step_s
    median = statistics.median(counted)
    line: dict[str, Any] = {
        "program": Path(sys.argv[0]).stem,
        "steps": len(step_s) + 1,
        "step_ms": round(median * 1e3, 2),
        "tokens_per_s": round(tokens_per_step / median),
    }
    if torch.cuda.is_available():
        line["peak_allocated_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        line["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
    print(json.dumps(line | more), flush=True)
