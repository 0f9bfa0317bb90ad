"""What a pipeline's ranks wait for, and when they run what."""

from itertools import pairwise

import msgspec

from meshwright.plan.collective import hop_seconds
from meshwright.plan.frame import Frame
from meshwright.plan.kept import BYTES, tokens_of
from meshwright.plan.part import STATE_BYTES
from meshwright.plan.passes import StageWalks
from meshwright.plan.rates import rates_of
from meshwright.plan.replay import KINDS, Seconds, replay, replay_steadily
from meshwright.record import PlannedPass, PlannedPipeline
from meshwright.spec import Job, rank_of_stage, stage_count


class Idle(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds that the mean rank of a pipeline waits in a step.

    bubble_s: with equal stages and free transfers; imbalance_s: more, because stages are not equal; transfers_s: more,
    because transfers take time. sent_s: all that its transfers take, hidden or not.
    """

    bubble_s: float = 0.0
    imbalance_s: float = 0.0
    transfers_s: float = 0.0
    sent_s: float = 0.0

    def total_s(self) -> float:
        """All waiting."""
        return self.bubble_s + self.imbalance_s + self.transfers_s


def explain_idle(job: Job, frame: Frame, stages: list[StageWalks], busy_s: float, *, brief: bool) -> Idle:
    """Replay the schedule as it is, with free transfers, and with equal stages too: steps differ by what waits.

    busy_s: of the mean rank, all the same in each of them. brief: all waiting as bubble, for one replay alone.
    """
    if job.layout.pipeline == 1:
        return Idle()
    timetable, hops = frame.timetable, stage_hops(job)
    seconds = [stage.seconds() for stage in stages]
    tied_s = sum_tied(job, frame)
    if brief:
        return Idle(bubble_s=replay(job.layout, timetable, seconds, hops).finish_s - busy_s + tied_s)
    actual_s = replay_steadily(job.layout, timetable, seconds, hops).finish_s
    free = [0.0] * len(hops)
    unequal_s = replay_steadily(job.layout, timetable, seconds, free).finish_s
    means = mean_seconds(frame, seconds)
    equal_s = replay_steadily(job.layout, timetable, [means] * len(seconds), free).finish_s
    microbatches = job.layout.accumulation(job.data.global_batch)
    return Idle(
        bubble_s=min(equal_s, unequal_s) - busy_s,
        imbalance_s=max(0.0, unequal_s - equal_s),
        transfers_s=actual_s - unequal_s + tied_s,
        sent_s=2 * microbatches * sum(hops) / job.layout.pipeline + tied_s,
    )


def mean_seconds(frame: Frame, seconds: list[Seconds]) -> Seconds:
    """The mean of each kind of pass over the table, those of a step's first and last microbatch among them."""
    sums, counts = [0.0] * len(KINDS), [0] * len(KINDS)
    for rank in frame.timetable.steps:
        for stage, _, kind in rank:
            sums[kind] += seconds[stage][kind]
            counts[kind] += 1
    return [total / count if count else 0.0 for total, count in zip(sums, counts, strict=True)]


def stage_hops(job: Job) -> list[float]:
    """Seconds that a microbatch's activations, or their gradient, take to each stage from the one before, and back.

    They lie split along the sequence as they do between blocks.
    """
    layout, rates = job.layout, rates_of(job.cluster)
    size_bytes = tokens_of(job) * job.model.d_model * BYTES[layout.precision] / layout.tensor
    ranks = [rank_of_stage(layout, stage) for stage in range(stage_count(layout))]
    hops = [hop_seconds(layout, job.cluster, pair, size_bytes, rates) for pair in pairwise(ranks)]
    return [0.0, *hops]


def sum_tied(job: Job, frame: Frame) -> float:
    """Seconds in which the two ends add up the gradients of a tied embedding, each for its part."""
    if not job.model.tied_embeddings:
        return 0.0
    ends = (0, rank_of_stage(job.layout, stage_count(job.layout) - 1))
    size_bytes = frame.cut.root.local * STATE_BYTES
    return hop_seconds(job.layout, job.cluster, ends, size_bytes, rates_of(job.cluster))


def draw_pipeline(job: Job, frame: Frame, stages: list[StageWalks]) -> PlannedPipeline:
    """When each rank runs which pass, as predicted."""
    seconds = [stage.seconds() for stage in stages]
    drawn = replay_steadily(job.layout, frame.timetable, seconds, stage_hops(job))
    timetable = drawn.timetable
    held = {stage.index: stage.layers for part in frame.parts for stage in part.stages}
    return PlannedPipeline(
        schedule=job.layout.schedule,
        stage_layers=tuple(held[index] for index in sorted(held)),
        stage_ranks=tuple(rank_of_stage(job.layout, index) for index in sorted(held)),
        left_out=timetable.repeats * timetable.per_round,
        ranks=tuple(
            tuple(
                PlannedPass(kind=kind, stage=stage, microbatch=each, begin_s=end - seconds[stage][place], end_s=end)
                for (kind, stage, each), (_, _, place), end in zip(actions, steps, ends, strict=True)
            )
            for actions, steps, ends in zip(timetable.table, timetable.steps, drawn.ends_s, strict=True)
        ),
    )
