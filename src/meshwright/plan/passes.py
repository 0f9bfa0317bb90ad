"""Seconds of each stage's passes in a step: what of them is gathered and reduced when is `zero`'s meaning."""

import msgspec

from meshwright.plan.collective import build_shard_ring
from meshwright.plan.frame import Frame
from meshwright.plan.kept import is_compiled
from meshwright.plan.part import Kind, Part, Stage, holds_whole
from meshwright.plan.rates import rates_of
from meshwright.plan.replay import Seconds
from meshwright.plan.walk import Walk, walk_backward, walk_forward
from meshwright.plan.work import Does, Moves, Piece, build_copies, build_pieces, stage_pieces
from meshwright.spec import SPLIT_BACKWARD, Job


class StageWalks(msgspec.Struct, frozen=True, kw_only=True):
    """A stage's passes. first: the forward pass of a step's first microbatch; last: the backward pass of its last;
    forward, backward: of all others; middle: both together. weights_s: of a backward pass, the gradients of matrices,
    which come by themselves where it is cut in two. closing_s: reductions that begin only after all of these. hidden:
    transfers under one microbatch's passes. wait_s: what the device waits for the host in either pass, however far
    ahead the host is else; launch_s: what the host takes to launch either, which a device that is faster waits for.
    """

    first: Walk
    forward: Walk
    backward: Walk
    last: Walk
    middle: Walk
    weights_s: float
    closing_s: float
    wait_s: float
    launch_s: float
    hidden: Moves

    def seconds(self) -> Seconds:
        """How long each kind of pass keeps its rank."""
        first, forward, backward, last = (
            walk.busy_s() + self.late_s(walk) for walk in (self.first, self.forward, self.backward, self.last)
        )
        weights_s, closing_s = self.weights_s, self.closing_s
        inputs = (backward - weights_s, last - weights_s - closing_s)
        return (first, forward, backward, last, *inputs, weights_s, weights_s + closing_s)

    def late_s(self, walk: Walk) -> float:
        """What the device waits for the host in one of the passes; what closes the last one hides none of it."""
        busy_s = walk.busy_s() - (self.closing_s if walk is self.last else 0.0)
        return self.wait_s + max(0.0, self.launch_s - busy_s)

    def host_s(self, microbatches: int) -> float:
        """The same of all passes of a step."""
        ends_s = self.late_s(self.first) + self.late_s(self.last)
        return ends_s + (microbatches - 1) * (self.late_s(self.forward) + self.late_s(self.backward))


def walk_stages(job: Job, frame: Frame) -> list[StageWalks]:
    """Every stage's passes, first to last."""
    pieces = frame.pieces or build_pieces(job, frame.cut)
    known: dict[Kind, StageWalks] = {}
    walks: dict[int, StageWalks] = {}
    again = job.layout.recomputed_layers(job.model.layers)
    for stage in (stage for part in frame.parts for stage in part.stages):
        # Stages in the middle are alike.
        alike = stage.kind(frame.cut, again)
        if alike not in known:
            known[alike] = walk_stage(job, stage_pieces(job, frame.cut, pieces, stage), stage)
        walks[stage.index] = known[alike]
    return [walks[index] for index in sorted(walks)]


def walk_stage(job: Job, pieces: list[Piece], stage: Stage) -> StageWalks:
    """One stage's passes."""
    layout, overlaps = job.layout, rates_of(job.cluster).overlaps and job.trainer.overlaps
    split = layout.schedule in SPLIT_BACKWARD

    def in_pass(*, backward: bool, first: bool = False, last: bool = False) -> list[Piece]:
        if not job.trainer.gathers:
            accumulates = Does(accumulates=backward and layout.accumulation(job.data.global_batch) > 1)
            return [piece.in_pass(accumulates, accumulates) for piece in pieces]
        # A mixture's experts may be split where the rest is not, and the other way round.
        does = [
            backward_does(job, shards, last=last)
            if backward
            else Does(gathers=first or not holds_whole(layout, shards))
            for shards in (layout.parameter_shards, layout.expert_shard)
        ]
        return [piece.in_pass(*does) for piece in pieces]

    slowed = rates_of(job.cluster).contention

    def forward_of(*, first: bool) -> Walk:
        return walk_forward(in_pass(backward=False, first=first), overlaps=overlaps).slowed(slowed)

    def backward_of(*, last: bool) -> Walk:
        reduces_beside = job.trainer.overlaps_reductions
        walk = walk_backward(
            in_pass(backward=True, last=last), overlaps=overlaps, last=last, overlaps_reductions=reduces_beside
        )
        return walk.slowed(slowed)

    first, forward = forward_of(first=True), forward_of(first=False)
    backward, last, closing = backward_of(last=False), backward_of(last=True), Walk()
    if split:
        # Weights' gradients come after the passes that FSDP would reduce behind: all of it shows.
        copies = [(p.count, p.copies + p.routed) for p in pieces]
        scatter_s = sum(count * each.scatter_s for count, each in copies)
        replica_s = sum(count * each.all_reduce_s for count, each in copies)
        closing = Walk(
            compute_s=sum(count * each.copy_in_s for count, each in copies),
            shard_s=scatter_s,
            replica_s=replica_s,
            exposed_shard_s=scatter_s,
            exposed_replica_s=replica_s,
        )
    return StageWalks(
        first=first,
        forward=forward,
        backward=backward,
        last=last + closing,
        middle=forward + backward,
        weights_s=sum(p.count * p.weights_s for p in pieces),
        closing_s=closing.busy_s(),
        wait_s=stage_waits(job, stage),
        launch_s=0.0 if job.cluster.device.kind == "cpu" else stage_launches(job, stage) / 2,
        hidden=Moves(
            tensor_s=sum(p.count * p.hidden.tensor_s for p in pieces),
            context_s=sum(p.count * p.hidden.context_s for p in pieces),
        ),
    )


class DataWalk(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank's parameters and gradients travel outside of its passes, in seconds: exposed, and all of it."""

    shard_s: float = 0.0
    replica_s: float = 0.0
    moved_s: float = 0.0


def walk_data(job: Job, part: Part, stages: list[StageWalks]) -> DataWalk:
    """The same for a trainer that keeps parameters whole: once a step, gradients reduced and parameters gathered again.

    Beside compute they have a microbatch's passes to hide in, but for the last bucket: as much as a block's.
    """
    if job.trainer.gathers:
        return DataWalk()
    groups = part.groups
    copies = build_copies(job, groups.whole(), build_shard_ring(job.layout, job.cluster))
    shard_s, replica_s = copies.gather_s + copies.scatter_s, copies.all_reduce_s
    moved_s = shard_s + replica_s
    if not moved_s or not (job.trainer.overlaps and rates_of(job.cluster).overlaps):
        return DataWalk(shard_s=shard_s, replica_s=replica_s, moved_s=moved_s)
    # A stage's gradients are whole while the others along the pipeline run their last microbatches.
    rounds = min(job.layout.pipeline, job.layout.accumulation(job.data.global_batch)) if len(part.stages) > 1 else 1
    beside_s = rounds * sum(stages[stage.index].middle.busy_s() for stage in part.stages)
    exposed = max(moved_s - beside_s, moved_s / max(1, groups.layers)) / moved_s
    return DataWalk(shard_s=shard_s * exposed, replica_s=replica_s * exposed, moved_s=moved_s)


def backward_does(job: Job, shards: int, *, last: bool) -> Does:
    """What is done in a backward pass with parameters over so many shards."""
    layout = job.layout
    holds = holds_whole(layout, shards)
    reduces = (last or not holds) and layout.schedule not in SPLIT_BACKWARD
    return Does(
        gathers=layout.zero == 3,
        scatters=reduces,
        all_reduces=reduces and last and layout.replica > 1,
        accumulates=holds and layout.accumulation(job.data.global_batch) > 1,
    )


def stage_launches(job: Job, stage: Stage) -> float:
    """What the host takes to launch a stage's work on one microbatch.

    FSDP wraps each block, a mixture's experts, the head and the root; what runs again is launched again.
    """
    rates = rates_of(job.cluster)
    again = stage.first(job.layout.recomputed_layers(job.model.layers))
    launches_s = (rates.block_host_s if is_compiled(job) else rates.eager_host_s) * (stage.layers + again / 2)
    if job.trainer.gathers:
        launches_s += rates.group_host_s * (stage.layers + stage_mixtures(job, stage) + 1 + stage.head)
    ends = (stage.root + stage.head) / 2
    return launches_s + (rates.tensor_host_s * (stage.layers + ends + again / 2) if job.layout.tensor > 1 else 0.0)


def stage_waits(job: Job, stage: Stage) -> float:
    """What the device waits for the host in either pass of a microbatch, however far ahead the host is else."""
    rates = rates_of(job.cluster)
    if job.cluster.device.kind == "cpu":
        return stage_launches(job, stage) / 2
    handed_s = 0.0 if job.layout.pipeline == 1 or job.trainer.gathers or is_compiled(job) else rates.handed_wait_s
    return handed_s + stage_mixtures(job, stage) * (
        rates.routed_wait_s + (rates.sent_wait_s if job.layout.expert > 1 else 0.0)
    )


def stage_mixtures(job: Job, stage: Stage) -> int:
    """Blocks with a mixture."""
    experts = job.model.experts
    return 0 if experts is None else stage.layers - stage.first(experts.dense_layers)
