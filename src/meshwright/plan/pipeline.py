"""What a pipeline's ranks wait for, and when they run what."""

from collections import Counter
from itertools import pairwise

import msgspec

from meshwright.plan.activations import BYTES, tokens_of
from meshwright.plan.collective import hop_seconds
from meshwright.plan.frame import Frame
from meshwright.plan.part import STATE_BYTES
from meshwright.plan.passes import StageWalks
from meshwright.plan.rates import rates_of
from meshwright.plan.replay import Replay, replay
from meshwright.record import PlannedPass, PlannedPipeline
from meshwright.spec import Action, Job, rank_of_stage, stage_count


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


def explain_idle(job: Job, frame: Frame, stages: list[StageWalks]) -> Idle:
    """Replay the schedule as it is, with free transfers, and with equal stages too: steps differ by what waits."""
    if job.layout.pipeline == 1:
        return Idle()
    timetable, ranks = frame.timetable, job.layout.pipeline
    hops = stage_hops(job)
    seconds = pass_seconds(frame, stages)
    actual = replay(job.layout, timetable, seconds.__getitem__, hops)
    free = [0.0] * len(hops)
    unequal = replay(job.layout, timetable, seconds.__getitem__, free)
    means = mean_seconds(seconds)
    equal = replay(job.layout, timetable, lambda action: means[action.kind], free)
    # Each rank is busy as long in all of them: over the rounds left out as well as in the table.
    busy_s = sum(seconds.values()) / ranks
    round_s = sum(stage.middle.busy_s() + 2 * stage.launch_s for stage in stages) / ranks
    busy_s += timetable.repeats * timetable.per_round * round_s
    bubble_s = min(equal.finish_s, unequal.finish_s) - busy_s
    microbatches = job.layout.accumulation(job.data.global_batch)
    tied_s = sum_tied(job, frame)
    return Idle(
        bubble_s=max(0.0, bubble_s),
        imbalance_s=max(0.0, unequal.finish_s - equal.finish_s),
        transfers_s=actual.finish_s - unequal.finish_s + tied_s,
        sent_s=2 * microbatches * sum(hops) / ranks + tied_s,
    )


def pass_seconds(frame: Frame, stages: list[StageWalks]) -> dict[Action, float]:
    """How long each pass of the table takes."""
    microbatches = frame.timetable.microbatches
    return {
        action: stages[action.stage].seconds(action, microbatches) for rank in frame.timetable.table for action in rank
    }


def mean_seconds(seconds: dict[Action, float]) -> dict[str, float]:
    """The mean of each kind of pass."""
    sums: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for action, value in seconds.items():
        sums[action.kind] += value
        counts[action.kind] += 1
    return {kind: sums[kind] / counts[kind] for kind in sums}


def stage_hops(job: Job) -> list[float]:
    """Seconds that a microbatch's activations, or their gradient, take to each stage from the one before, and back.

    They lie split along the sequence as they do between blocks.
    """
    layout, rates = job.layout, rates_of(job.cluster.device)
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
    return hop_seconds(job.layout, job.cluster, ends, size_bytes, rates_of(job.cluster.device))


def draw_pipeline(job: Job, frame: Frame, stages: list[StageWalks]) -> PlannedPipeline:
    """When each rank runs which pass, as predicted."""
    seconds = pass_seconds(frame, stages)
    times = replay(job.layout, frame.timetable, seconds.__getitem__, stage_hops(job))
    held = {stage.index: stage.layers for part in frame.parts for stage in part.stages}
    return PlannedPipeline(
        schedule=job.layout.schedule,
        stage_layers=tuple(held[index] for index in sorted(held)),
        stage_ranks=tuple(rank_of_stage(job.layout, index) for index in sorted(held)),
        left_out=frame.timetable.repeats * frame.timetable.per_round,
        ranks=tuple(drawn_rank(frame, times, rank) for rank in range(job.layout.pipeline)),
    )


def drawn_rank(frame: Frame, times: Replay, rank: int) -> tuple[PlannedPass, ...]:
    """One rank's passes."""
    rows = zip(frame.timetable.table[rank], times.begins_s[rank], times.ends_s[rank], strict=True)
    return tuple(
        PlannedPass(kind=kind, stage=stage, microbatch=each, begin_s=begin_s, end_s=end_s)
        for (kind, stage, each), begin_s, end_s in rows
    )
