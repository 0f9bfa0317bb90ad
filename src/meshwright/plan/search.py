"""The layouts a job could have: which fit, how fast they are, and which of them are worth trying."""

from collections.abc import Callable, Iterable, Iterator
from math import gcd

import msgspec

from meshwright.plan.fit import Rejected, fit_recompute, with_layout
from meshwright.plan.frame import Frame
from meshwright.plan.kept import is_masked
from meshwright.plan.part import Cut, Part, build_parts, cut_model
from meshwright.plan.replay import Timetable, build_timetable
from meshwright.plan.time import bound_step
from meshwright.record import Prediction
from meshwright.spec import (
    MESHWRIGHT,
    Axis,
    Job,
    Layout,
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
SHORTEST_PIECE = 1024
# Of pipeline, context and tensor together, as many are tried in every variant.
GRIDS = 6
# No longer pipelines are tried; and none that cannot come this near to the fastest found.
LONGEST_PIPELINE = 32
SLACK = 1.25
# Of the step, what a pipeline must wait for other schedules to be worth a try.
WORTH_A_TRY = 0.02
# gpipe holds more and is never faster than 1f1b, which is what a grid is tried with first.
SCHEDULES: tuple[tuple[Schedule, tuple[int, ...]], ...] = (
    ("interleaved", (2, 4)),
    ("zero-bubble", (2,)),
    ("zbv", (2,)),
    ("dualpipev", (2,)),
)
MOST_EXPERT_RANKS = 64

Predict = Callable[[Job, Frame], Prediction]


class Search:
    """What is found and what is refused so far, and what candidates share, so that it is worked out once."""

    def __init__(self, job: Job, predict: Predict) -> None:
        self.job = job
        self.predict = predict
        self.found: list[Prediction] = []
        self.rejected: list[Rejected] = []
        self._cuts: dict[tuple[int, ...], Cut] = {}
        self._timetables: dict[tuple[object, ...], Timetable] = {}
        self._parts: dict[tuple[object, ...], tuple[Part, ...]] = {}

    def frame(self, job: Job) -> Frame:
        """The candidate's frame, from parts that others have had made."""
        layout = job.layout
        axes = (layout.pipeline > 1, layout.shard, layout.context, layout.tensor, layout.expert)
        microbatches = layout.accumulation(job.data.global_batch)
        order = (layout.pipeline, layout.schedule, layout.stages_per_rank, microbatches)
        if axes not in self._cuts:
            self._cuts[axes] = cut_model(job)
        if order not in self._timetables:
            self._timetables[order] = build_timetable(layout, microbatches)
        # Stages are balanced by what their blocks recompute too.
        split = (*axes, *order[:3], layout.recomputed_layers(job.model.layers), layout.stage_layers)
        if split not in self._parts:
            self._parts[split] = build_parts(job, cut=self._cuts[axes])
        return Frame(cut=self._cuts[axes], parts=self._parts[split], timetable=self._timetables[order])

    def is_promising(self, bound_s: float) -> bool:
        """Whether a step that is no shorter than this could be among the fastest."""
        return not self.found or bound_s <= SLACK * min(p.step_s for p in self.found)

    def add(self, candidates: Iterable[Job]) -> None:
        """Predict these, but for pipelines that would be left far behind."""
        for job in candidates:
            frame = self.frame(job)
            if job.layout.pipeline == 1 or self.is_promising(bound_step(job, frame)):
                self.found.append(self.predict(job, frame))

    def refuse(self, layout: Layout, error: SettingError) -> None:
        """Remember why no layout of this kind can run."""
        self.rejected.append(Rejected(layout=layout, reason=error.reason, nearest=error.nearest))


def search_layouts(job: Job, predict: Predict) -> tuple[list[Prediction], list[Rejected]]:
    """Predictions of the layouts that fit, and a rejection for each split that does not divide or fit."""
    search = Search(job, predict)
    search_plain(search)
    search_grids(search)
    return search.found, sorted(search.rejected, key=lambda r: r.layout.world_size)


def plainest(job: Job, *, pipeline: int = 1, shard: int = 1, context: int = 1, tensor: int = 1) -> Layout:
    """The job's layout with these axes and none other. What means something along one of the others is left out."""
    base = job.layout
    return Layout(
        pipeline=pipeline,
        shard=shard,
        context=context,
        tensor=tensor,
        order=base.order,
        precision=base.precision,
        context_form=base.context_form if context > 1 else "ring",
        async_tensor=base.async_tensor and tensor > 1,
    )


def search_plain(search: Search) -> None:
    """Replica, shard, tensor and expert, on every number of ranks."""
    job = search.job
    for tensor in axis_sizes(job.cluster.devices_per_node):
        layout = plainest(job, tensor=tensor)
        try:
            check_split(layout, job.model, job.data.sequence)
        except SettingError as error:
            search.refuse(layout, error)
            continue
        for ranks in axis_sizes(job.cluster.devices):
            if ranks % tensor:
                continue
            data = msgspec.structs.replace(layout, shard=ranks // tensor)
            if divides_batch(search, data):
                for split in splits(layout, ranks // tensor):
                    for divided in divide_experts(search, split):
                        search_split(search, divided)


def divides_batch(search: Search, layout: Layout) -> bool:
    """Whether the layout's ranks can share the batch; why not is remembered."""
    try:
        check_layout(layout, search.job.data.global_batch)
    except SettingError as error:
        search.refuse(layout, error)
        return False
    return True


def search_split(search: Search, split: Layout) -> None:
    """Add the predictions of one split over the axes, with every zero and microbatch, or why they cannot run."""
    job = search.job
    share = job.data.global_batch // split.data_size
    for zero in (3, 2, 1) if split.parameter_shards > 1 else (3,):
        for microbatch in microbatches(share, split):
            candidate = with_layout(job, msgspec.structs.replace(split, zero=zero, microbatch=microbatch))
            fitting, missing = fit_recompute(candidate, search.frame)
            search.add(fitting)
            if missing is not None:
                # Larger microbatches need more still.
                search.rejected.append(missing)
                if microbatch == 1:
                    # And so does holding more whole.
                    return
                break


def search_grids(search: Search) -> None:
    """Pipelines and divided sequences, on all devices: each grid by a bound, then the most promising in every way."""
    tried = [(bound_s, candidate) for grid in grids(search.job) for bound_s, candidate in try_grid(search, grid)]
    for bound_s, candidate in sorted(tried, key=lambda pair: pair[0])[:GRIDS]:
        if search.is_promising(bound_s):
            vary_grid(search, candidate.layout)


def grids(job: Job) -> Iterator[Layout]:
    """Every choice of pipeline, context and tensor, where one of the first two is there, on all devices."""
    devices, model = job.cluster.devices, job.model
    if job.cluster.device.kind == "cpu" and job.cluster.nodes == 1:
        # Ranks that share a machine's cores are no faster for being more; what fits a rank fits one process.
        return
    for tensor in axis_sizes(job.cluster.devices_per_node):
        for pipeline in axis_sizes(min(devices, LONGEST_PIPELINE)):
            for context in axis_sizes(devices):
                inner = pipeline * context * tensor
                long = job.data.sequence // (context * tensor) >= SHORTEST_PIECE or context == 1
                if pipeline * context == 1 or devices % inner or pipeline > model.layers or not long:
                    continue
                if not divides_model(job, tensor):
                    continue
                grid = plainest(job, pipeline=pipeline, shard=devices // inner, context=context, tensor=tensor)
                yield choose_form(job, grid)


def choose_form(job: Job, grid: Layout) -> Layout:
    """The grid with heads exchanged where it can be and a ring would be slow: with documents or windows."""
    if grid.context == 1 or not is_masked(job):
        return grid
    exchanged = msgspec.structs.replace(grid, context_form="all-to-all")
    try:
        check_context(exchanged, job.model, job.data.sequence)
    except SettingError:
        return grid
    return exchanged


def divides_model(job: Job, tensor: int) -> bool:
    """Whether tensor ranks can share the model; search_plain says why they cannot."""
    try:
        check_split(plainest(job, tensor=tensor), job.model, job.data.sequence)
    except SettingError:
        return False
    return True


def check_grid(job: Job, layout: Layout) -> None:
    """Raise SettingError for what no cluster could run, however experts are divided."""
    check_layout(layout, job.data.global_batch)
    check_context(layout, job.model, job.data.sequence)
    microbatches, own = layout.accumulation(job.data.global_batch), job.trainer.name == MESHWRIGHT.name
    check_schedule(layout, microbatches, job.model.layers, short=not own)


def try_grid(search: Search, grid: Layout) -> list[tuple[float, Job]]:
    """The grid sharded over all its data ranks, a sequence at a time, with as little freed between passes as fits.

    With a bound on its step; nothing where it cannot run or does not fit.
    """
    try:
        check_grid(search.job, grid)
    except SettingError as error:
        search.refuse(grid, error)
        return []
    missing: Rejected | None = None
    for divided in reversed(divide_experts(search, grid)):
        for zero in (1, 3) if grid.parameter_shards > 1 else (1,):
            candidate = with_layout(search.job, msgspec.structs.replace(divided, zero=zero))
            fitting, missing = fit_recompute(candidate, search.frame)
            if fitting:
                return [
                    min(((bound_step(each, search.frame(each)), each) for each in fitting), key=lambda pair: pair[0])
                ]
    search.rejected += [missing] if missing is not None else []
    return []


def vary_grid(search: Search, grid: Layout) -> None:
    """Every way to share data and parameters within a grid, then other schedules for the fastest of them."""
    job = search.job
    before = len(search.found)
    ranks = grid.data_size
    for shard in shard_sizes(job, grid, ranks):
        sizes = {"replica": ranks // shard, "shard": shard, "expert": 1}
        split = msgspec.structs.replace(grid, recompute="none", **sizes)
        for divided in divide_experts(search, split):
            search_split(search, divided)
    found = search.found[before:]
    if not found:
        return
    best = min(found, key=lambda p: p.step_s)
    # In brief, all that a pipeline waits for is bubble.
    waits = best.step.bubble > WORTH_A_TRY * best.step_s
    for layout in manners(best.layout, schedules=waits):
        try:
            check_grid(job, layout)
        except SettingError:
            # The grid has its layouts; this way of running it is just not one of them.
            continue
        candidate = with_layout(job, layout)
        search.add(fit_recompute(candidate, search.frame)[0])


def manners(best: Layout, *, schedules: bool) -> Iterator[Layout]:
    """The layout with other schedules and, where it divides sequences, with heads exchanged for tokens."""
    best = msgspec.structs.replace(best, recompute="none")
    if best.context > 1:
        other = "ring" if best.context_form == "all-to-all" else "all-to-all"
        yield msgspec.structs.replace(best, context_form=other)
    if best.pipeline > 1 and schedules:
        for schedule, held in SCHEDULES:
            for stages in held:
                # Weights' gradients that come late need parameters that stay.
                zero = best.zero if schedule == "interleaved" else 1
                yield msgspec.structs.replace(best, schedule=schedule, stages_per_rank=stages, zero=zero)


def shard_sizes(job: Job, grid: Layout, ranks: int) -> list[int]:
    """Over all data ranks, over those of a node, or not at all."""
    inside = max(1, job.cluster.devices_per_node // (grid.context * grid.tensor))
    return sorted({ranks, gcd(ranks, inside), 1}, reverse=True)


def divide_experts(search: Search, layout: Layout) -> list[Layout]:
    """The layout with every power of two along expert that can divide the model's experts; why none can is remembered.

    What `expert` leaves of the ranks divides each expert's matrices, so that it may work with one size and not another.
    """
    found: list[Layout] = []
    refusals: list[tuple[Layout, SettingError]] = []
    most = MOST_EXPERT_RANKS if search.job.model.experts else 1
    for size in (1 << power for power in range(most.bit_length())):
        divided = msgspec.structs.replace(layout, expert=size)
        try:
            check_expert(divided, search.job.model)
        except SettingError as error:
            refusals.append((divided, error))
        else:
            found.append(divided)
    if not found:
        search.refuse(*refusals[0])
    return found


def axis_sizes(devices: int) -> list[int]:
    """Powers of two and divisors up to a number of devices."""
    powers = {1 << exponent for exponent in range(devices.bit_length()) if 1 << exponent <= devices}
    return sorted(powers.union(divisors(devices)))


def splits(layout: Layout, ranks: int) -> Iterator[Layout]:
    """Every division of `ranks` over replica and shard."""
    for shard in divisors(ranks):
        yield msgspec.structs.replace(layout, replica=ranks // shard, shard=shard)


def microbatches(share: int, layout: Layout) -> list[int]:
    """Sequences at once that divide a rank's share of the batch, into as many microbatches as a pipeline needs."""
    divided = layout.pipeline * layout.context > 1
    most = min(share // layout.pipeline, LARGEST_DIVIDED_MICROBATCH if divided else LARGEST_MICROBATCH)
    return [n for n in range(1, most + 1) if share % n == 0]


def axes_in_use(layout: Layout) -> int:
    """How many kinds of communication a layout has."""
    axes: tuple[Axis, ...] = ("pipeline", "replica", "shard", "context", "tensor")
    return sum(layout.size(axis) > 1 for axis in axes) + (layout.expert > 1)
