"""The fastest (or cheapest) layouts of a job, found without a look at most of the others.

A search goes from the coarse to the fine: how the model is divided and runs, then how data are shared, then what has
to be recomputed to fit. At each level it goes on with what has the least bound (plan/bound.py), and ends where no bound
is below what is found already, so that it finds what predicting every layout would find.
"""

from bisect import insort
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush, nsmallest
from typing import Any

import msgspec

from meshwright.plan.bound import bound_passes, bound_shared, bound_step, compute_seconds
from meshwright.plan.compute import has_known_peak
from meshwright.plan.demand import Demand
from meshwright.plan.fit import (
    Rejected,
    count_least,
    fit_recompute,
    host_refusal,
    least_recompute,
    missing_bytes,
    recomputing,
    reject_memory,
    with_layout,
)
from meshwright.plan.frame import Frame
from meshwright.plan.shared import Shared
from meshwright.plan.space import Space
from meshwright.plan.time import share_machine
from meshwright.plan.weigh import Weigh, by_time
from meshwright.record import Prediction
from meshwright.spec import (
    AXES,
    Job,
    Layout,
    Recompute,
    SettingError,
)

# Predicted step times closer than this are a tie: the simpler layout comes first.
TIE = 0.01
# By how much of itself a bound is taken to grow with each level.
LOOSE = 0.06
# So many of the best are looked for, and of each of these axes the best with it.
MOST = 10
# Grids that are tried for one with an axis that none of the best has.
PROMISING = 2
LEADERS = ("pipeline", "context", "tensor", "expert")

Predict = Callable[[Job, Frame], Prediction]


class Node(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """Layouts that have something in common, and their bound. level: how much; place: for ties. turn_s: what decides
    whose turn it is: the bound, and more of it the less is known, so that some layouts are soon found."""

    turn_s: float
    place: int
    bound_s: float
    level: int
    layout: Layout


def build_node(bound_s: float, place: int, level: int, layout: Layout) -> Node:
    """A node with its turn."""
    turn_s = bound_s * (1 + LOOSE * (len(LEVELS) - 1 - level))
    return Node(turn_s=turn_s, place=place, bound_s=bound_s, level=level, layout=layout)


class Search:
    """What is found and what is refused so far.

    most: of the best, how many are sure to be found, and whatever ties with the last of several.
    """

    def __init__(
        self,
        job: Job,
        predict: Predict,
        *,
        fixed: Mapping[str, Any] | None = None,
        weigh: Weigh = by_time,
        most: int = MOST,
        shared: Shared | None = None,
    ) -> None:
        self.job = job
        self.predict = predict
        self.space = Space(job, fixed)
        self.weigh = weigh
        self.most = most
        self.known = has_known_peak(job.cluster.device, with_layout(job, self.space.base))
        self.shared = shared or Shared(job, known=self.known)
        self.demand = Demand(job, self.space, self.shared)
        self.found: list[Prediction] = []
        self.rejected: list[Rejected] = []
        self._values: list[float] = []
        # The axis that layouts are looked for with, once the best are found.
        self.leading = ""
        self._leaders: dict[str, float] = {}
        self._nodes = 0
        self._seen: set[Layout] = set()
        self._rejected: set[Layout] = set()
        # What must be recomputed at the least, as far as is known.
        self._choices: dict[Layout, list[Recompute | int]] = {}
        self._misfits: dict[Layout, list[tuple[int, int, int]]] = {}
        # Seconds of one device for a sequence, at the least.
        self._least_s = min(map(self.sequence_seconds, self.space.least_divided())) if self.known else 0.0

    def limit(self) -> float:
        """What is worse than this is not among the best."""
        if len(self._values) < self.most:
            return float("inf")
        return self._values[self.most - 1] * (1 + TIE if self.most > 1 else 1)

    def worth(self, bound_s: float, layout: Layout) -> bool:
        """Whether a layout with such a bound could be one that is looked for."""
        if not self.known:
            return len(self.found) < self.most
        value = self.weigh(bound_s, layout.world_size)
        return value <= (self._leaders.get(self.leading, float("inf")) if self.leading else self.limit())

    def add(self, prediction: Prediction) -> None:
        """Remember what fits."""
        layout = prediction.layout
        value = self.weigh(prediction.step_s, layout.world_size)
        self.found.append(prediction)
        insort(self._values, value)
        for axis in LEADERS:
            if getattr(layout, axis) > 1:
                self._leaders[axis] = min(value, self._leaders.get(axis, value))

    def refuse(self, layout: Layout, error: SettingError) -> None:
        """Remember why no layout of this kind can run."""
        self.reject(Rejected(layout=layout, reason=error.reason, nearest=error.nearest))

    def run(self, ranks: Sequence[int]) -> None:
        """Search these numbers of ranks, best in the order of what could be best."""
        for size in ranks:
            least_s = self.job.data.global_batch * self._least_s / size
            if self.weigh(least_s, size) > self.limit() and not self.space.one_machine:
                continue
            self.search_ranks(size)

    def sequence_seconds(self, layout: Layout) -> float:
        """Of one device for a sequence, by kernels alone, which no number of ranks makes shorter."""
        job = share_machine(with_layout(self.job, layout))
        whole_s, _ = compute_seconds(job, self.shared.cut(job), self.shared.pieces(job, ()))
        return whole_s / layout.microbatch * layout.context * layout.tensor

    def search_ranks(self, ranks: int) -> None:
        """Every grid and manner on so many ranks, the most promising first."""
        nodes = [
            build_node(self.bound_grid(layout), place, 0, layout) for place, layout in enumerate(self.manners(ranks))
        ]
        self._nodes = len(nodes)
        self.go_through(nodes)
        for axis in LEADERS if self.known and self.most > 1 else ():
            if axis not in self._leaders and (axis != "expert" or self.job.model.experts is not None):
                self.leading = axis
                others = (node for node in nodes if getattr(node.layout, axis) > 1 or axis == "expert")
                self.go_through(nsmallest(PROMISING, others))
        self.leading = ""

    def manners(self, ranks: int) -> Iterator[Layout]:
        """Every grid with every schedule and microbatch; why others cannot run is remembered."""
        for grid in self.space.grids(ranks):
            error = self.space.grid_refusal(grid)
            if error is not None:
                self.refuse(grid, error)
                continue
            if grid.pipeline * grid.context == 1:
                self.reject_splits(grid)
            for manner in self.space.manners(grid):
                for microbatch in self.space.microbatches(manner):
                    layout = msgspec.structs.replace(manner, microbatch=microbatch)
                    error = self.space.manner_refusal(layout)
                    if error is None:
                        yield layout
                    elif layout.schedule == "1f1b" or "schedule" in self.space.fixed:
                        # Other schedules of a grid are just not among its layouts.
                        self.refuse(layout, error)

    def go_through(self, nodes: Iterable[Node]) -> None:
        """Take the most promising apart until nothing that is left could be among the best."""
        heap = list(nodes)
        heapify(heap)
        while heap:
            node = heappop(heap)
            if not self.worth(node.bound_s, node.layout):
                continue
            for layout, bound_s in LEVELS[node.level](self, node.layout):
                if bound_s < float("inf") and self.worth(bound_s, layout):
                    self._nodes += 1
                    bound_s = max(bound_s, node.bound_s)
                    heappush(heap, build_node(bound_s, self._nodes, node.level + 1, layout))

    def bound_grid(self, layout: Layout) -> float:
        """The bound that needs nothing but how the model is divided and runs."""
        if not self.known:
            return 0.0
        return self.bound_compute(self.space.most_experts(layout))

    def bound_compute(self, layout: Layout) -> float:
        """The bound of what a rank computes."""
        if not self.known:
            return 0.0
        job = share_machine(with_layout(self.job, layout))
        whole_s, block_s = compute_seconds(job, self.shared.cut(job), self.shared.pieces(job, ()))
        return bound_passes(job, layout.accumulation(job.data.global_batch), whole_s, block_s)

    def fit_grid(self, layout: Layout) -> Iterator[tuple[Layout, float]]:
        """The same with what must be recomputed where least is held whole."""
        yield layout, self.bound_fitting(msgspec.structs.replace(layout, zero=3))

    def fit_manner(self, layout: Layout) -> Iterator[tuple[Layout, float]]:
        """With what must be recomputed by what is held whole."""
        for zero in self.space.among("zero", (1, 2, 3)):
            kept = msgspec.structs.replace(layout, zero=zero)
            yield kept, self.bound_fitting(kept)

    def bound_fitting(self, layout: Layout) -> float:
        """The bound with what must be recomputed even where parameters are divided most, and as much as can be lies
        with the host; inf where it does not fit. Whatever is divided less recomputes as much or more."""
        return min(
            (
                self.bound_compute(msgspec.structs.replace(layout, expert=expert, recompute=recompute))
                for expert, choices in self.demand.choices(layout).items()
                for recompute in choices
            ),
            default=float("inf"),
        )

    def share(self, layout: Layout) -> Iterator[tuple[Layout, float]]:
        """Every way to share data and to place ranks."""
        for sharing in self.space.sharings(layout):
            if layout.zero not in self.space.zeros(sharing) or self.space.expert_refusal(sharing) is not None:
                continue
            again = self.demand.choices(layout).get(sharing.expert, [])
            placed: set[tuple[object, ...]] = set()
            for order in self.space.orders(sharing):
                placement = self.shared.sharing(order)
                if placement not in placed:
                    placed.add(placement)
                    bounds = [self.bound_leaf(msgspec.structs.replace(order, recompute=each)) for each in again]
                    self._choices[order] = again
                    yield order, min(bounds, default=float("inf"))

    def bound_leaf(self, layout: Layout) -> float:
        """The bound that knows all but what is recomputed and what a pipeline waits for."""
        if not self.known:
            return 0.0
        job = share_machine(with_layout(self.job, layout))
        pieces = self.shared.pieces(job, self.shared.sharing(layout))
        return bound_shared(job, self.shared.cut(job), pieces, layout.accumulation(job.data.global_batch))

    def fit_ends(self, layout: Layout) -> Iterator[tuple[Layout, float]]:
        """The layout with what a pipeline's ends must recompute: other ranks may need more."""
        if layout.pipeline == 1:
            yield layout, 0.0
            return
        # With a pipeline one offload is tried, if only because it is fixed.
        job = with_layout(self.job, msgspec.structs.replace(layout, offload=self.space.offloads(layout)[-1]))
        fixed, known = self.space.fixed.get("recompute"), self._choices[layout]
        self._choices[job.layout] = least_recompute(job, self.shared.end_frame, fixed, known)
        fitting = [recomputing(job, each) for each in self._choices[job.layout]]
        bounds = [self.bound_leaf(each.layout) for each in fitting]
        if self.known and any(self.worth(bound_s, layout) for bound_s in bounds):
            bounds = [bound_step(each, self.shared.walk_frame(each)) for each in fitting]
        yield layout, min(bounds, default=float("inf"))

    def fit(self, layout: Layout) -> Iterator[tuple[Layout, float]]:
        """The layout with what it must recompute or offload to fit."""
        kind = msgspec.structs.replace(layout, order=AXES, zero=1, microbatch=1, replica=layout.data_size, shard=1)
        offloads = self.space.offloads(layout)
        for offload in offloads:
            candidate = with_layout(self.job, msgspec.structs.replace(layout, offload=offload))
            if not self.space.may_offload(candidate):
                continue
            if offload != "none" and not self.worth(self.bound_leaf(candidate.layout), layout):
                continue
            larger = range(layout.shard, layout.world_size + 1) if layout.shard > 1 else ()
            misfits = self._misfits.setdefault(msgspec.structs.replace(kind, offload=offload), [])
            # Larger microbatches need more, and so does holding more whole, or over fewer ranks, but for one. A single
            # microbatch needs no room for sums of gradients.
            alone = layout.accumulation(self.job.data.global_batch) == 1
            if any(
                layout.zero <= zero
                and (microbatch == layout.microbatch or (microbatch < layout.microbatch and not alone))
                and shard in (layout.shard, *larger)
                for zero, shard, microbatch in misfits
            ):
                continue
            fitting, missing = fit_recompute(
                candidate,
                self.shared.frame,
                self.space.fixed.get("recompute"),
                at_least=count_least(self._choices.get(candidate.layout, ())),
            )
            if missing is not None:
                misfits.append((layout.zero, layout.shard, layout.microbatch))
                if offload == offloads[0] and layout.microbatch == 1 and layout.zero == max(self.space.zeros(layout)):
                    self.reject(missing)
            yield from ((each.layout, self.bound_leaf(each.layout)) for each in fitting)
            if fitting and ("recompute" in self.space.fixed or fitting[0].layout.recompute in ("none", 0)):
                # What gives nothing up for memory is not offered with less.
                return

    def walk(self, layout: Layout) -> Iterator[tuple[Layout, float]]:
        """The layout with the bound of its pipeline's ranks."""
        job = with_layout(self.job, layout)
        yield layout, bound_step(job, self.shared.frame(job)) if layout.pipeline > 1 else 0.0

    def finish(self, layout: Layout) -> Iterator[tuple[Layout, float]]:
        """Predict the layout."""
        if layout not in self._seen:
            self._seen.add(layout)
            job = with_layout(self.job, layout)
            self.add(self.predict(job, self.shared.frame(job)))
        yield from ()

    def reject(self, missing: Rejected) -> None:
        """Remember what does not fit, once."""
        if missing.layout not in self._rejected:
            self._rejected.add(missing.layout)
            self.rejected.append(missing)

    def reject_splits(self, grid: Layout) -> None:
        """Remember which divisions over replica and shard do not fit, however much is recomputed."""
        if "recompute" in self.space.fixed:
            return
        legal, refused = False, list[tuple[Layout, SettingError]]()
        for split in self.space.sharings(grid):
            given = {name: value for name, value in self.space.fixed.items() if name != "replica"}
            full = with_layout(self.job, msgspec.structs.replace(split, recompute="full", **given))
            error = self.space.refusal(full.layout)
            if error is not None:
                refused.append((split, error))
                continue
            legal = True
            if on_host := host_refusal(full, self.shared.frame):
                self.reject(on_host)
                continue
            if missing_bytes(full, self.shared.frame) > 0:
                self.reject(reject_memory(full, self.shared.frame))
        if refused and not legal:
            self.refuse(*refused[0])


# What takes a layout apart, from coarse to fine: layouts, each with a bound.
LEVELS: tuple[Callable[[Search, Layout], Iterator[tuple[Layout, float]]], ...] = (
    Search.fit_grid,
    Search.fit_manner,
    Search.share,
    Search.fit_ends,
    Search.fit,
    Search.walk,
    Search.finish,
)


def search_layouts(
    job: Job,
    predict: Predict,
    *,
    fixed: Mapping[str, Any] | None = None,
    ranks: Sequence[int] | None = None,
    weigh: Weigh = by_time,
    most: int = MOST,
    shared: Shared | None = None,
) -> tuple[list[Prediction], list[Rejected]]:
    """Predictions of the best layouts that fit, and rejections of what does not divide or fit.

    ranks: numbers of them to search, all unless given. shared: of another search of the job, with the same fixed but
    for sizes and offload. Whatever is within TIE of the last of `most` is found too.
    """
    search = Search(job, predict, fixed=fixed, weigh=weigh, most=most, shared=shared)
    sizes = search.space.ranks() if ranks is None else list(ranks)
    # More ranks are faster, as a rule; where time is not known, fewer are simpler.
    search.run(sizes[::-1] if search.known else sizes)
    return search.found, sorted(search.rejected, key=lambda r: r.layout.world_size)
