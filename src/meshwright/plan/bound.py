"""Seconds that a step cannot be shorter than, from a part of what predicting it takes: what a search need not look at.

Each leaves out or underestimates what it does not look at, never the other way round: benchmarks/search_check.py
compares what is found with everything there is.
"""

from math import ceil

import msgspec

from meshwright.plan.compute import has_known_peak, predict_optimizer
from meshwright.plan.frame import Frame
from meshwright.plan.part import Cut, holds_whole
from meshwright.plan.passes import backward_does, walk_data, walk_stages
from meshwright.plan.rates import rates_of
from meshwright.plan.work import NONE, Does, Piece, Pieces
from meshwright.spec import SPLIT_BACKWARD, Job, held_stages, stages_per_rank

# Of a microbatch's passes, what the forward pass is at the least: where all of it is done again.
FORWARD = 1 / 4
# Stages are not all equal: those that a microbatch comes through first may take this share of their part.
EVEN = 0.9

# What passes do with parameters: those that are no routed experts', and those that are.
Deeds = list[tuple[Does, Does]]


def count_pieces(job: Job, cut: Cut, pieces: Pieces) -> list[tuple[int, Piece]]:
    """How many of each piece the whole model has; the head is the last."""
    layers, again = job.model.layers, job.layout.recomputed_layers(job.model.layers)
    first = min(cut.dense, again)
    others = again - first
    return [
        (1, pieces.root),
        (first, pieces.first_again),
        (cut.dense - first, pieces.first),
        (others, pieces.others_again),
        (layers - cut.dense - others, pieces.others),
        (1, pieces.head),
    ]


def compute_seconds(job: Job, cut: Cut, pieces: Pieces) -> tuple[float, float]:
    """Of a microbatch, on the ranks that share its sequences: the whole model's kernels, and the shortest block's.

    With transfers along tensor, where products do not hide them.
    """

    def busy_s(piece: Piece) -> float:
        moves_s = 0.0
        if not job.layout.async_tensor:
            moves_s = piece.forward.tensor_s + piece.backward.tensor_s + piece.again.tensor_s
        return piece.forward_s + piece.backward_s + piece.again_s + moves_s

    counted = count_pieces(job, cut, pieces)
    return sum(count * busy_s(piece) for count, piece in counted), min(busy_s(p) for n, p in counted[1:-1] if n)


def bound_passes(job: Job, microbatches: int, whole_s: float, block_s: float) -> float:
    """A step's passes, of so many microbatches that take the whole model `whole_s` each, and a block `block_s`.

    Along a pipeline some rank has its share of blocks or more. The last one begins when the first microbatch has come
    through a stage of each rank before it, and where it does not put off the gradients of weights, the last one's
    gradient goes back through as many when it ends.
    """
    ranks, layers = job.layout.pipeline, job.model.layers
    if ranks == 1:
        return microbatches * whole_s
    passed_s = EVEN * whole_s * (ranks - 1) / (ranks * stages_per_rank(job.layout))
    if job.layout.schedule in SPLIT_BACKWARD:
        passed_s *= FORWARD
    return max(microbatches * whole_s / ranks + passed_s, microbatches * ceil(layers / ranks) * block_s)


def bound_shared(job: Job, cut: Cut, pieces: Pieces, microbatches: int) -> float:
    """The step with what its division over data ranks costs: copies, links kept busy, and the optimizer."""
    rates, ranks = rates_of(job.cluster), job.layout.pipeline
    overlaps = rates.overlaps and job.trainer.overlaps
    slowed = rates.contention if overlaps else 1.0
    whole_s = links_s = ends_s = 0.0
    shortest_s = float("inf")
    counted = count_pieces(job, cut, pieces)
    block_does, head_does = middle_passes(job)
    for place, (count, piece) in enumerate(counted):
        if not count:
            continue
        copies = NONE
        for plain, routed in head_does if place == len(counted) - 1 else block_does:
            copies += piece.copies_in_pass(plain, routed)
        kernels_s = copies.copy_out_s + copies.copy_in_s + copies.accumulate_s
        moves_s = piece.forward.total() + piece.backward.total() + piece.again.total()
        busy_s = piece.forward_s + piece.backward_s + piece.again_s + moves_s + kernels_s
        # The last of a pass's reductions may end beside the next pass.
        sent_s = max(0.0, count - 1) * copies.scatter_s + count * copies.gather_s
        whole_s += count * busy_s + slowed * sent_s
        links_s += sent_s
        ends_s += count * (piece.copies.all_reduce_s + piece.routed.all_reduce_s) if job.trainer.gathers else 0.0
        if 0 < place < len(counted) - 1:
            shortest_s = min(shortest_s, busy_s)
    passes_s = bound_passes(job, microbatches, whole_s, shortest_s)
    links_s = (microbatches * links_s + ends_s) / ranks
    return max(passes_s, links_s) + bound_optimizer(job, cut)


def bound_optimizer(job: Job, cut: Cut) -> float:
    """The update of the mean rank's parameters."""
    return predict_optimizer(job, mean_local(job, cut))


def mean_local(job: Job, cut: Cut) -> int:
    """Parameters (elements) that the mean rank along pipeline holds; some hold as many or more."""
    groups = ((1, cut.root), (cut.dense, cut.first), (job.model.layers - cut.dense, cut.others), (1, cut.head))
    return sum(count * group.local for count, group in groups) // job.layout.pipeline


def middle_passes(job: Job) -> tuple[Deeds, Deeds]:
    """What the passes of a microbatch in the middle of a step do with a block's parameters, and with the head's, which
    stay between its passes."""
    layout = job.layout
    if not job.trainer.gathers:
        accumulates = Does(accumulates=layout.accumulation(job.data.global_batch) > 1)
        return [(accumulates, accumulates)], [(accumulates, accumulates)]
    plain, routed = layout.parameter_shards, layout.expert_shard
    forward = (Does(gathers=not holds_whole(layout, plain)), Does(gathers=not holds_whole(layout, routed)))
    backward = (backward_does(job, plain, last=False), backward_does(job, routed, last=False))
    stays = msgspec.structs.replace(backward[0], gathers=False), msgspec.structs.replace(backward[1], gathers=False)
    return [forward, backward], [forward, stays]


def bound_step(job: Job, frame: Frame) -> float:
    """The step of a pipeline without replaying its schedule; 0 where peaks are not known.

    A rank begins when the first microbatch has come through the stages before its first, and where it does not put off
    the gradients of weights, the last one's gradient goes back through them when it ends.
    """
    if not has_known_peak(job.cluster.device, job):
        return 0.0
    layout, microbatches = job.layout, job.layout.accumulation(job.data.global_batch)
    stages = walk_stages(job, frame)
    seconds = [stage.seconds() for stage in stages]
    split = layout.schedule in SPLIT_BACKWARD
    whole = [each[0] + each[3] + (microbatches - 1) * (each[1] + each[2]) for each in seconds]
    bound_s = 0.0
    for rank in range(layout.pipeline):
        held = held_stages(layout, rank)
        before_s = sum(each[1] + (0.0 if split else each[2]) for each in seconds[: held[0]])
        bound_s = max(bound_s, before_s + sum(whole[stage] for stage in held))
    data = [walk_data(job, part, stages) for part in frame.parts]
    closing = [
        predict_optimizer(job, part.local) + d.shard_s + d.replica_s for part, d in zip(frame.parts, data, strict=True)
    ]
    return bound_s + max(closing)
