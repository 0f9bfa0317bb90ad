"""What the candidates of a search have in common, worked out once."""

import msgspec

from meshwright.plan.activations import Seen
from meshwright.plan.collective import build_expert_rings, build_ring, build_shard_ring, stride_of
from meshwright.plan.frame import Frame
from meshwright.plan.kept import is_compiled
from meshwright.plan.memory import tell_apart
from meshwright.plan.part import Cut, Part, Stage, build_parts, build_stages, cut_model
from meshwright.plan.replay import Timetable, build_timetable, end_timetable, split_rounds
from meshwright.plan.work import Pieces, build_pieces
from meshwright.spec import SPLIT_BACKWARD, Axis, Cluster, Job, Layout, stage_count


class Shared:
    """What candidates share, so that it is worked out once."""

    def __init__(self, job: Job, *, known: bool) -> None:
        self.job = job
        self.known = known
        self._cuts: dict[tuple[object, ...], Cut] = {}
        self._tables: dict[tuple[object, ...], Timetable] = {}
        self._ended: dict[tuple[object, ...], Timetable] = {}
        self._parts: dict[tuple[object, ...], tuple[Part, ...]] = {}
        self._pieces: dict[tuple[object, ...], Pieces] = {}
        self._end_parts: dict[tuple[object, ...], tuple[Part, ...]] = {}
        self._stages: dict[tuple[object, ...], list[Stage]] = {}
        self._apart: dict[tuple[object, ...], tuple[int, ...]] = {}
        self._seen: dict[tuple[object, ...], Seen] = {}
        self._placements: dict[tuple[object, ...], tuple[object, ...]] = {}

    def cut(self, job: Job) -> Cut:
        """The model's groups by the candidate's axes."""
        layout = job.layout
        axes = (layout.pipeline > 1, layout.shard, layout.context, layout.tensor, layout.expert)
        if axes not in self._cuts:
            self._cuts[axes] = cut_model(job)
        return self._cuts[axes]

    def frame(self, job: Job) -> Frame:
        """The candidate's frame."""
        timetable, split, parts = self.timetable(job), self.split(job), self.parts(job)
        place = (*split, timetable.microbatches, timetable.per_round)
        if place not in self._apart:
            whole = Frame(cut=self.cut(job), parts=parts, timetable=timetable)
            self._apart[place] = tuple(part.rank for part in tell_apart(job, whole))
        return Frame(
            cut=self.cut(job),
            parts=parts,
            timetable=timetable,
            pieces=self.pieces(job, self.sharing(job.layout)) if self.known else None,
            seen=self.seen_stages(job),
            apart=self._apart[place],
        )

    def end_frame(self, job: Job) -> Frame:
        """The frame with a pipeline's first and last rank alone: of most schedules one needs the most or nearly, and
        they come at less cost."""
        layout = job.layout
        if layout.pipeline == 1:
            return self.frame(job)
        order, _ = self.order(job)
        if order not in self._ended:
            self._ended[order] = end_timetable(layout, layout.accumulation(job.data.global_batch))
        split = self.split(job)
        if split not in self._end_parts:
            ends = (0, layout.pipeline - 1)
            self._end_parts[split] = build_parts(job, ends, cut=self.cut(job), stages=self.stages(job))
        return Frame(
            cut=self.cut(job),
            parts=self._end_parts[split],
            timetable=self._ended[order],
            seen=self.seen_stages(job),
            apart=(0, 1),
        )

    def walk_frame(self, job: Job) -> Frame:
        """The frame without the order of passes: what their seconds take."""
        ends = self.end_frame(job)
        pieces = self.pieces(job, self.sharing(job.layout)) if self.known else None
        return msgspec.structs.replace(ends, parts=self.parts(job), pieces=pieces)

    def order(self, job: Job) -> tuple[tuple[object, ...], int]:
        """What a timetable depends on but for the rounds that it leaves out, and how many these are."""
        layout, microbatches = job.layout, job.layout.accumulation(job.data.global_batch)
        per_round, repeats = split_rounds(layout, microbatches)
        shortened = microbatches - repeats * per_round
        return (layout.pipeline, layout.schedule, layout.stages_per_rank, shortened, per_round), repeats

    def timetable(self, job: Job) -> Timetable:
        """The candidate's timetable; of steps that repeat more rounds or fewer, the table is the same."""
        order, repeats = self.order(job)
        if order not in self._tables:
            self._tables[order] = build_timetable(job.layout, job.layout.accumulation(job.data.global_batch))
        return msgspec.structs.replace(self._tables[order], repeats=repeats)

    def split(self, job: Job) -> tuple[object, ...]:
        """What each rank's part of the model depends on. Stages are balanced by what their blocks recompute too."""
        layout = job.layout
        stages = (layout.pipeline, layout.schedule, layout.stages_per_rank, layout.stage_layers)
        again = layout.recomputed_layers(job.model.layers)
        return (*stages, again, layout.context, layout.tensor, layout.expert, layout.shard)

    def parts(self, job: Job) -> tuple[Part, ...]:
        """What each of a pipeline's ranks has of the model."""
        split = self.split(job)
        if split not in self._parts:
            self._parts[split] = build_parts(job, cut=self.cut(job), stages=self.stages(job))
        return self._parts[split]

    def stages(self, job: Job) -> list[Stage]:
        """The candidate's stages."""
        layout = job.layout
        key = (stage_count(layout), layout.recomputed_layers(job.model.layers), layout.stage_layers)
        if key not in self._stages:
            self._stages[key] = build_stages(job)
        return self._stages[key]

    def seen_stages(self, job: Job) -> Seen:
        """What was seen of all that stages keep between passes: it does not depend on how parameters are shared."""
        layout = job.layout
        divided = (layout.pipeline > 1, layout.context, layout.context_form, layout.tensor, layout.expert)
        policy = (layout.recompute == "selective", layout.schedule in SPLIT_BACKWARD)
        return self._seen.setdefault((*divided, layout.microbatch, *policy, self.machine(layout)), {})

    def machine(self, layout: Layout) -> int:
        """What tells apart the shares that ranks have of a machine."""
        return layout.world_size if self.job.cluster.device.kind == "cpu" else 0

    def sharing(self, layout: Layout) -> tuple[object, ...]:
        """What pieces depend on beside how the model is divided: how data are shared, and where ranks are."""
        key = (
            layout.pipeline,
            layout.replica,
            layout.shard,
            layout.context,
            layout.tensor,
            layout.expert,
            layout.order,
        )
        if key not in self._placements:
            self._placements[key] = (*place_layout(layout, self.job.cluster), layout.world_size)
        return self._placements[key]

    def pieces(self, job: Job, sharing: tuple[object, ...]) -> Pieces:
        """A microbatch's pieces. sharing: () where how data are shared makes no difference to what is asked for."""
        layout = job.layout
        sizes = (layout.pipeline > 1, layout.context, layout.context_form, layout.tensor, layout.expert)
        selective = layout.recompute == "selective"
        key = (*sizes, layout.microbatch, is_compiled(job), selective, self.machine(layout), *sharing)
        if key not in self._pieces:
            self._pieces[key] = build_pieces(job, self.cut(job))
        return self._pieces[key]


def place_layout(layout: Layout, cluster: Cluster) -> tuple[object, ...]:
    """What layouts that differ in their order alone have alike where it makes no difference."""
    axes: tuple[Axis, ...] = ("replica", "context", "tensor")
    rings = [build_ring(layout, axis, cluster) for axis in axes]
    experts = build_expert_rings(layout, cluster) if layout.expert > 1 else ()
    stride = min(stride_of(layout, "pipeline"), cluster.devices_per_node) if layout.pipeline > 1 else 0
    return (layout.replica, layout.shard, stride, build_shard_ring(layout, cluster), *rings, *experts)
