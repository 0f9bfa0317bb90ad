"""The predicted account of a pipeline's step, against its schedule's longest chain of passes."""

import itertools
from functools import cache
from typing import Any

import pytest

from meshwright.plan import predict
from meshwright.plan.compute import predict_optimizer
from meshwright.plan.frame import Frame, build_frame
from meshwright.plan.machine import cpu_cluster
from meshwright.plan.passes import walk_stages
from meshwright.plan.pipeline import stage_hops, sum_tied
from meshwright.plan.rates import rates_of
from meshwright.plan.replay import KINDS
from meshwright.spec import (
    Action,
    DataSettings,
    Job,
    Layout,
    ModelSpec,
    RunSettings,
    Schedule,
    build_schedule,
    check_job,
    stage_count,
)
from meshwright.spec.hardware import cluster_of

# Wide enough to keep a GPU busy.
MODEL = ModelSpec(
    layers=8,
    d_model=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    feed_forward=14336,
    vocabulary=32000,
    tied_embeddings=True,
)
# With stages on a rank.
SCHEDULES: tuple[tuple[Schedule, int], ...] = (
    ("gpipe", 1),
    ("1f1b", 1),
    ("interleaved", 2),
    ("interleaved", 4),
    ("zero-bubble", 2),
    ("zbv", 2),
    ("dualpipev", 2),
)


def longest_chain(job: Job, frame: Frame) -> float:
    """Seconds of the longest chain through a whole step's passes, each behind the one before it on its rank and the one
    that gives it its input."""
    layout, hops, seconds = job.layout, stage_hops(job), [stage.seconds() for stage in walk_stages(job, frame)]
    microbatches, last = layout.accumulation(job.data.global_batch), stage_count(layout) - 1
    table = build_schedule(layout, microbatches)
    before = {action: previous for rank in table for previous, action in itertools.pairwise(rank)}
    actions = {(action.kind, action.stage, action.microbatch): action for rank in table for action in rank}

    @cache
    def end_s(action: Action) -> float:
        kind, stage, each = action.kind, action.stage, action.microbatch
        ready = [end_s(before[action])] if action in before else [0.0]
        if kind == "F" and stage:
            ready.append(end_s(actions["F", stage - 1, each]) + hops[stage])
        if kind in "BI" and stage < last:
            (giver,) = (actions[given, stage + 1, each] for given in "BI" if (given, stage + 1, each) in actions)
            ready.append(end_s(giver) + hops[stage + 1])
        name = f"first {kind}" if kind == "F" and not each else kind
        name = f"last {kind}" if kind != "F" and each == microbatches - 1 else name
        return max(ready) + seconds[stage][KINDS.index(name)]

    return max(end_s(rank[-1]) for rank in table)


@pytest.mark.parametrize(("schedule", "held"), SCHEDULES)
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("recompute", ["none", 3])
def test_the_account_of_every_schedule_closes(schedule: Schedule, held: int, kind: str, recompute: Any) -> None:
    layout = Layout(
        pipeline=2, shard=2, schedule=schedule, stages_per_rank=held, zero=1, recompute=recompute, replica=2
    )
    cluster = cluster_of("2x4xh100") if kind == "cuda" else cpu_cluster(layout.world_size)
    data = DataSettings(sequence=1024, global_batch=64)
    job = Job(run=RunSettings(name="test", steps=1), model=MODEL, data=data, layout=layout, cluster=cluster)
    check_job(job)
    step, frame, rates = predict(job).step, build_frame(job), rates_of(job.cluster)
    # The parts add up to the longest chain of passes and what comes after it.
    after_s = max(predict_optimizer(job, part.local) for part in frame.parts) + sum_tied(job, frame) + step.comm_control
    # Launches are a part of a CPU's passes; a GPU waits for what of them is longer than its own.
    late_s = sum(stage.host_s(16) for stage in walk_stages(job, frame)) / layout.pipeline
    assert step.host == pytest.approx(rates.step_s + late_s)
    assert step.total() == pytest.approx(longest_chain(job, frame) + after_s + rates.step_s, rel=1e-3)
    assert step.bubble > 0
