"""The layouts that a search chooses from, level by level: how the model is divided, how it runs, how data are shared.

What a layout may be is said here alone: benchmarks/search_check.py enumerates all of it without any pruning.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from math import gcd
from typing import Any

import msgspec

from meshwright.spec import (
    MESHWRIGHT,
    SPLIT_BACKWARD,
    Axis,
    Job,
    Layout,
    Offload,
    Schedule,
    SettingError,
    check_context,
    check_expert,
    check_layout,
    check_schedule,
    check_split,
)
from meshwright.spec.numbers import divisors

# Larger microbatches fill no kernel better; gradient accumulation serves as well.
LARGEST_MICROBATCH = 64
# With a pipeline or a divided sequence memory is what such a layout is for, and more microbatches make less bubble.
LARGEST_DIVIDED_MICROBATCH = 4
# A rank's piece of a sequence is no shorter than this: attention's kernels and the ring's messages become too small.
SHORTEST_PIECE = 4096
# No longer pipelines are tried.
LONGEST_PIPELINE = 32
MOST_EXPERT_RANKS = 64
# gpipe holds more than 1f1b and is never faster.
SCHEDULES: tuple[tuple[Schedule, int], ...] = (
    ("1f1b", 0),
    ("interleaved", 2),
    ("interleaved", 4),
    ("zero-bubble", 2),
    ("zbv", 2),
    ("dualpipev", 2),
)
# Of other trainers, what all of them have.
COMMON_SCHEDULES = ("1f1b", "interleaved")
OFFLOADS: tuple[Offload, ...] = ("none", "optimizer", "parameters")
# The axes that may be the one that crosses nodes; tensor is as large as a node at most, and lies inside it.
OUTERMOST: tuple[Axis, ...] = ("pipeline", "replica", "shard", "context")


class Space:
    """The layouts that a job could have.

    fixed: settings of the layout that are not to be chosen, by their names in Layout; they may have values that are
    not tried otherwise.
    """

    def __init__(self, job: Job, fixed: Mapping[str, Any] | None = None) -> None:
        self.job = job
        self.fixed: Mapping[str, Any] = fixed or {}
        base = {
            name: self.fixed.get(name, getattr(job.layout, name)) for name in ("order", "precision", "async_tensor")
        }
        self.own = job.trainer.name == MESHWRIGHT.name
        # Whose parameters lie whole knows of states that are divided, and of no other `zero`.
        zero = {} if job.trainer.gathers else {"zero": 1}
        self.base = Layout(**zero, **base)

    def among(self, name: str, usual: Any) -> list[Any]:
        """What is tried of a setting: the usual choices, or what it is fixed to."""
        return [self.fixed[name]] if name in self.fixed else list(usual)

    @cached_property
    def one_machine(self) -> bool:
        """Whether ranks share one machine's cores: they are no faster for being more, so only data is divided."""
        cluster = self.job.cluster
        return cluster.device.kind == "cpu" and cluster.nodes == 1

    def ranks(self) -> list[int]:
        """Every number of ranks that is tried."""
        return axis_sizes(self.job.cluster.devices)

    def grids(self, ranks: int) -> Iterator[Layout]:
        """Every choice of pipeline, context and tensor on so many ranks; the rest is in `shard`."""
        job, cluster = self.job, self.job.cluster
        for tensor in self.among("tensor", axis_sizes(cluster.devices_per_node)):
            pipelines = [1] if self.one_machine else axis_sizes(min(ranks, LONGEST_PIPELINE, job.model.layers))
            for pipeline in self.among("pipeline", pipelines):
                contexts = [1] if self.one_machine else axis_sizes(ranks)
                longest = max(1, job.data.sequence // (SHORTEST_PIECE * tensor))
                for context in self.among("context", [size for size in contexts if size <= longest]):
                    inner = pipeline * context * tensor
                    if ranks % inner:
                        continue
                    for form in self.among("context_form", ("ring", "all-to-all") if context > 1 else ("ring",)):
                        yield msgspec.structs.replace(
                            self.base,
                            pipeline=pipeline,
                            shard=ranks // inner,
                            context=context,
                            tensor=tensor,
                            context_form=form,
                            async_tensor=self.base.async_tensor and (tensor > 1 or "async_tensor" in self.fixed),
                        )

    def manners(self, grid: Layout) -> Iterator[Layout]:
        """The grid with each schedule."""
        if grid.pipeline == 1 and not {"schedule", "stages_per_rank", "stage_layers"} & self.fixed.keys():
            yield grid
            return
        known = list(dict.fromkeys(name for name, _ in SCHEDULES if self.own or name in COMMON_SCHEDULES))
        names = [self.fixed["schedule"]] if "schedule" in self.fixed else known
        for schedule in names:
            usual = [held for name, held in SCHEDULES if name == schedule] or [0]
            for held in self.among("stages_per_rank", usual):
                yield msgspec.structs.replace(
                    grid, schedule=schedule, stages_per_rank=held, stage_layers=self.fixed.get("stage_layers", ())
                )

    def microbatches(self, grid: Layout) -> list[int]:
        """Sequences at once that divide a rank's share of the batch, into as many as a pipeline needs."""
        share = self.job.data.global_batch // grid.data_size
        divided = grid.pipeline * grid.context > 1
        most = min(share // grid.pipeline, LARGEST_DIVIDED_MICROBATCH if divided else LARGEST_MICROBATCH)
        # One, where there are too few for a pipeline, is refused with the reason.
        return self.among("microbatch", [n for n in range(1, max(1, most) + 1) if share % n == 0])

    def sharings(self, grid: Layout) -> Iterator[Layout]:
        """Every division of the grid's data ranks over replica and shard, and of experts over them."""
        ranks = grid.replica * grid.shard
        experts = [1 << power for power in range(MOST_EXPERT_RANKS.bit_length())] if self.job.model.experts else [1]
        for shard in self.among("shard", self.shards(grid, ranks)):
            if ranks % shard:
                continue
            replica = ranks // shard
            if replica != self.fixed.get("replica", replica):
                continue
            for expert in self.among("expert", experts):
                yield msgspec.structs.replace(grid, replica=replica, shard=shard, expert=expert)

    def most_experts(self, layout: Layout) -> Layout:
        """The layout with as many ranks along expert as there may be: the longer are their products, and the faster."""
        experts = self.job.model.experts
        if experts is None:
            return layout
        most = min(MOST_EXPERT_RANKS, layout.expert_ranks)
        sizes = [1 << power for power in range(most.bit_length())]
        return msgspec.structs.replace(layout, expert=max(size for size in sizes if experts.count % size == 0))

    def least_divided(self) -> Iterator[Layout]:
        """Layouts of which one's kernels take least of a device for a sequence: attention has others with context."""
        (tensor,), (microbatch,) = self.among("tensor", (1,)), self.among("microbatch", (LARGEST_MICROBATCH,))
        for context in self.among("context", (1, 2)):
            yield self.most_experts(
                msgspec.structs.replace(
                    self.base, shard=MOST_EXPERT_RANKS, context=context, tensor=tensor, microbatch=microbatch
                )
            )

    def shards(self, grid: Layout, ranks: int) -> list[int]:
        """Every division of the data ranks; where there is a pipeline or a divided sequence, over all of them, over
        those of a node or not at all."""
        if grid.pipeline * grid.context == 1:
            return [size for size in axis_sizes(ranks) if ranks % size == 0]
        inside = max(1, self.job.cluster.devices_per_node // (grid.context * grid.tensor))
        return sorted({ranks, gcd(ranks, inside), 1})

    def orders(self, layout: Layout) -> Iterator[Layout]:
        """The layout with each of its axes as the one that crosses nodes, its own first."""
        yield layout
        cluster = self.job.cluster
        if "order" in self.fixed or cluster.nodes == 1 or layout.world_size <= cluster.devices_per_node:
            return
        used = [axis for axis in layout.order if layout.size(axis) > 1 and axis in OUTERMOST]
        for axis in used[1:]:
            order = (axis, *(other for other in layout.order if other != axis))
            yield msgspec.structs.replace(layout, order=order)

    def zeros(self, layout: Layout) -> list[int]:
        """From what takes least memory on; all are one where nothing is divided."""
        divided = layout.parameter_shards > 1 or (self.job.model.experts is not None and layout.expert_shard > 1)
        if not self.job.trainer.gathers:
            return self.among("zero", (1,))
        # Where products are put off, what is divided would have to be gathered once more.
        whole = layout.schedule in SPLIT_BACKWARD and layout.parameter_shards > 1
        return [zero for zero in self.among("zero", (3, 2, 1) if divided else (3,)) if zero == 1 or not whole]

    def offloads(self, layout: Layout) -> list[Offload]:
        """What the host may hold: nothing first. The ranks of a pipeline hold little that it could."""
        if self.job.cluster.device.kind == "cpu" or layout.pipeline > 1 or not self.own:
            return self.among("offload", ("none",))
        return self.among("offload", OFFLOADS)

    def may_offload(self, job: Job) -> bool:
        """Whether there is anything that the host could hold."""
        offload = job.layout.offload
        if offload == "parameters":
            return job.layout.zero == 3
        return offload == "none" or job.optimizer.name != "sgd"

    def refusal(self, layout: Layout) -> SettingError | None:
        """Why the layout is none that could run; None where it could."""
        if error := self.grid_refusal(layout):
            return error
        job = self.job
        try:
            microbatches = layout.accumulation(job.data.global_batch)
            check_schedule(layout, microbatches, job.model.layers, short=not self.own)
            check_expert(layout, job.model)
        except SettingError as error:
            return error
        return None

    def grid_refusal(self, grid: Layout) -> SettingError | None:
        """Why the model, the batch or a sequence cannot be divided so; None where they can."""
        try:
            check_split(grid, self.job.model, self.job.data.sequence)
            check_layout(grid, self.job.data.global_batch)
            check_context(grid, self.job.model, self.job.data.sequence)
        except SettingError as error:
            return error
        return None

    def manner_refusal(self, layout: Layout) -> SettingError | None:
        """Why the layout cannot run in its schedule; None where it can."""
        job = self.job
        try:
            check_layout(layout, job.data.global_batch)
            plain = msgspec.structs.replace(layout, zero=1)
            check_schedule(plain, layout.accumulation(job.data.global_batch), job.model.layers, short=not self.own)
        except SettingError as error:
            return error
        return None

    def expert_refusal(self, layout: Layout) -> SettingError | None:
        """Why experts cannot be divided so; None where they can."""
        try:
            check_expert(layout, self.job.model)
        except SettingError as error:
            return error
        return None


def axis_sizes(devices: int) -> list[int]:
    """Powers of two and divisors up to a number of devices."""
    powers = {1 << exponent for exponent in range(devices.bit_length()) if 1 << exponent <= devices}
    return sorted(powers.union(divisors(devices)))


def axes_in_use(layout: Layout) -> int:
    """How many kinds of communication a layout has."""
    axes: tuple[Axis, ...] = ("pipeline", "replica", "shard", "context", "tensor")
    return sum(layout.size(axis) > 1 for axis in axes) + (layout.expert > 1)
