"""What one rank writes down of its life: spans for the run account, profiled steps for the step account."""

import json
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from meshwright.account import MemoryAccount, Purpose
from meshwright.parallel.mesh import SHARD_CONTEXT
from meshwright.record import Ended, Fault, LineWriter, Memory, RunFolder, Span, Step
from meshwright.record.kineto import PREFIX, STEP, measure_step
from meshwright.spec import AXES, Job, Layout, held_stages, rank_flops, stage_blocks

# Steps share a span until this many seconds have passed, so that a long run stays a short file.
FLUSH_S = 10.0
# Steps left alone before the first is profiled: the first compiles and fills caches.
WARM_STEPS = 3


class Recorder:
    """One rank's record of one attempt. Times are seconds since the epoch, on this host's clock."""

    def __init__(self, folder: RunFolder, attempt: int, job: Job, device: torch.device, *, began_s: float) -> None:
        self.rank = dist.get_rank()
        self._job = job
        self._device = device
        self._writer = LineWriter(folder.events(attempt, self.rank))
        self._profiler: profile | None = None
        # Where the stretch of steps since the last span began, and how many it holds so far.
        self._steps_since: float | None = None
        self._steps_count = 0
        self._profiled_step = 0
        # A GPU step begins where the device finished the one before, so that one must be in the trace too.
        self._lead = 1 if device.type == "cuda" else 0
        self._compiled_s = compile_seconds()
        self._first: int | None = None
        self._last_step = 0
        self.useful_s = useful_seconds(job, self.rank)
        self._write("startup", began_s, time.time())

    def _write(self, name: str, start_s: float, end_s: float, *, step: int = 0, count: int = 1) -> None:
        self._writer.append(Span(name=name, start_s=start_s, end_s=end_s, step=step, count=count))

    @contextmanager
    def span(self, name: str, step: int = 0) -> Iterator[None]:
        """A stretch outside the steps: evaluation, checkpoint, measurement."""
        # The device may still be at work on the steps launched so far; that time is theirs.
        self._synchronize()
        self._flush_steps()
        start = time.time()
        try:
            yield
        finally:
            self._write(name, self._book_compile(start, step), time.time(), step=step)

    def _book_compile(self, start: float, step: int) -> float:
        """Book what torch.compile has taken since `start` under its own name; return where the rest begins."""
        compiled = compile_seconds() - self._compiled_s
        if compiled <= 0:
            return start
        self._compiled_s += compiled
        self._write("compile", start, start + compiled, step=step)
        return start + compiled

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of a step, named for the profiler: input, forward, backward, optimizer, control."""
        with record_function(PREFIX + name):
            yield

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """One training step; every trace.every_steps-th is profiled."""
        self._first = step if self._first is None else self._first
        if self._opens_before(step):
            with self.span("measurement", step):
                self._open()
            self._profiled_step = step + self._lead
        since = time.time() if self._steps_since is None else self._steps_since
        with record_function(STEP):
            yield
        self._steps_since = self._book_compile(since, step)
        self._steps_count += 1
        self._last_step = step
        now = time.time()
        if now - self._steps_since > FLUSH_S:
            # Not a boundary of anything: the next stretch begins where this one ends.
            self._flush_steps()
            self._steps_since = now
        if self._profiler is not None and step == self._profiled_step:
            with self.span("measurement", step):
                self._close(step)

    def is_profiled(self, step: int) -> bool:
        """Whether `step` is one that is profiled."""
        every = self._job.trace.every_steps
        warm = self._first is not None and step >= self._first + WARM_STEPS
        return every > 0 and warm and step % every == every // 2

    def _opens_before(self, step: int) -> bool:
        profiled = step + self._lead
        return self._profiler is None and self.is_profiled(profiled) and profiled < self._job.run.steps

    def _open(self) -> None:
        self._synchronize()
        gpu = [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
        self._profiler = profile(activities=[ProfilerActivity.CPU, *gpu], acc_events=True)
        self._profiler.start()

    def _close(self, step: int) -> None:
        profiler, self._profiler = self._profiler, None
        assert profiler is not None
        self._synchronize()
        profiler.stop()
        try:
            measured = measure_step(
                chrome_trace(profiler),
                step=step,
                rank=self.rank,
                host=socket.gethostname(),
                purposes=group_purposes(self._job.layout),
                useful_s=self.useful_s,
            )
        # A full disk, or a trace that a new profiler writes otherwise, must not end the training that it watches.
        except (OSError, LookupError, ValueError) as error:
            self.fault(step, f"step {step} was profiled but not measured: {type(error).__name__}: {error}")
        else:
            share = expert_share(self._job, self.rank, sum(measured.expert_rows))
            self._writer.append(Step(measured=msgspec.structs.replace(measured, expert_share=share)))

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _flush_steps(self) -> None:
        if self._steps_since is not None:
            self._write("step", self._steps_since, time.time(), step=self._last_step, count=self._steps_count)
            self._steps_since, self._steps_count = None, 0

    def memory(self, step: int, account: MemoryAccount) -> None:
        """Write down what memory held in `step`."""
        self._writer.append(Memory(step=step, account=account))

    def fault(self, step: int, what: str) -> None:
        """Write down that something went wrong."""
        self._writer.append(Fault(step=step, time_s=time.time(), what=what))

    def close(self, how: str) -> None:
        """Write what is left and that this rank ended in good order."""
        if self._profiler is not None:  # a stop came between the step that opened it and the one to be measured
            self._profiler.stop()
            self._profiler = None
        self._synchronize()
        self._flush_steps()
        self._writer.append(Ended(step=self._last_step, time_s=time.time(), how=how))
        self._writer.close()


def chrome_trace(profiler: profile) -> dict[str, Any]:
    """A stopped profiler's trace as Chrome's format has it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_bytes())


def group_purposes(layout: Layout) -> dict[str, Purpose]:
    """What each process group carries, by its description.

    The mesh names its groups after its axes, but an axis that spans the world shares the group of all ranks, which
    otherwise carries small syncs alone. (Those are told apart by the phase that launches them, and so are attention's
    transfers along context.)
    """
    purposes: dict[str, Purpose] = {"default_pg": "control"}
    for axis in AXES:
        purposes[f"mesh_{axis}"] = axis
        if layout.size(axis) == layout.world_size > 1:
            purposes["default_pg"] = axis
    # Parameters are sharded over shard and context as over one axis.
    purposes[f"mesh_{SHARD_CONTEXT}"] = "shard"
    if layout.parameter_shards == layout.world_size > 1:
        purposes["default_pg"] = "shard"
    # A mixture's experts are sent to along one axis of their own, and split over the other, which may span the world.
    purposes["mesh_expert"], purposes["mesh_expert_shard"] = "expert", "shard"
    if layout.expert_shard == layout.world_size > 1 and purposes["default_pg"] == "control":
        purposes["default_pg"] = "shard"
    return purposes


def useful_flops(job: Job, rank: int) -> float:
    """One rank's model FLOPs of a step: of its own stages, shared with those that have the same."""
    along = job.layout.coordinates(rank)["pipeline"]
    flops = rank_flops(job.model, job.layout, job.data.sequence, along) * job.data.global_batch
    return flops * job.layout.pipeline / job.layout.world_size


def useful_seconds(job: Job, rank: int) -> float:
    """These at the rank's device's peak, seconds; 0 where no peak is known."""
    peak = job.cluster.device.peak_flops_per_s(job.layout.precision)
    return useful_flops(job, rank) / peak if peak else 0.0


def expert_share(job: Job, rank: int, rows: int) -> float:
    """The share of a rank's FLOPs of a step that its experts took, given the rows that they were sent; 0 of none."""
    model, layout = job.model, job.layout
    if model.experts is None or not rows:
        return 0.0
    # Three matrices, each multiplied once forward and twice backward, at two FLOPs an element.
    row_flops = 3 * 3 * 2 * model.d_model * model.experts.feed_forward
    stages = stage_blocks(model, layout, job.data.sequence)
    held = [layer for stage in held_stages(layout, layout.coordinates(rank)["pipeline"]) for layer in stages[stage]]
    passes = sum(not model.is_dense(layer) for layer in held) * job.data.global_batch * job.data.sequence
    mean_rows = passes * model.experts.per_token * layout.pipeline / layout.world_size
    others = useful_flops(job, rank) - mean_rows * row_flops
    return rows * row_flops / (others + rows * row_flops)


def compile_seconds() -> float:
    """Seconds that torch.compile has taken in this process so far."""
    spent = torch._dynamo.utils.cumulative_time_spent_ns
    return (spent.get("entire_frame_compile", 0.0) + spent.get("entire_backward_compile", 0.0)) * 1e-9
