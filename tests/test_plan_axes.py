"""Predictions along pipeline, context and expert: bytes of every rank, schedules replayed, transfers by hand."""

import itertools
import random
from collections import Counter
from math import prod

import msgspec
import pytest

from meshwright.plan import build_plan, predict, predict_memory, predict_states
from meshwright.plan.collective import hop_seconds
from meshwright.plan.fit import SPARE
from meshwright.plan.machine import cpu_cluster
from meshwright.plan.part import build_parts
from meshwright.plan.rates import GPU
from meshwright.plan.replay import build_timetable, replay, replay_steadily
from meshwright.record import Prediction
from meshwright.spec import (
    ZOO,
    DataSettings,
    Experts,
    Job,
    Layout,
    ModelSpec,
    RunSettings,
    Schedule,
    check_job,
    count_parameters,
    parameter_shapes,
    rank_of_stage,
    stage_count,
)
from meshwright.spec.decode import planning_job
from meshwright.spec.hardware import cluster_of

DENSE = ModelSpec(
    layers=8, d_model=64, heads=8, kv_heads=4, head_dim=8, feed_forward=100, vocabulary=509, tied_embeddings=True
)
MIXTURE = ModelSpec(
    family="mixtral",
    layers=8,
    d_model=64,
    heads=8,
    kv_heads=4,
    head_dim=8,
    feed_forward=100,
    vocabulary=509,
    experts=Experts(count=8, per_token=2, feed_forward=36, shared=1),
)
SPLITS: tuple[tuple[Schedule, int], ...] = (("zero-bubble", 2), ("zbv", 2), ("dualpipev", 2))
WHOLE: tuple[tuple[Schedule, int], ...] = (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 4))


def a_job(model: ModelSpec, layout: Layout, *, gpus: str = "", global_batch: int = 64, sequence: int = 64) -> Job:
    job = Job(
        run=RunSettings(name="test", steps=1),
        model=model,
        data=DataSettings(sequence=sequence, global_batch=global_batch),
        layout=layout,
        cluster=cluster_of(gpus) if gpus else cpu_cluster(layout.world_size),
    )
    check_job(job)
    return job


def job_on(gpus: str, model: str, sequence: int, global_batch: int, *settings: str) -> Job:
    return planning_job(model=model, gpus=gpus, sequence=sequence, global_batch=global_batch, settings=settings)


# --- Bytes -----------------------------------------------------------------------------------------------------------

LAYOUTS = [
    Layout(pipeline=4, shard=4),
    Layout(pipeline=2, replica=2, shard=2, context=2, tensor=2),
    Layout(pipeline=2, schedule="interleaved", stages_per_rank=3, tensor=4, stage_layers=(1, 2, 1, 1, 2, 1)),
    Layout(pipeline=4, schedule="zbv", tensor=2, order=("tensor", "pipeline", "replica", "shard", "context")),
]
EXPERT_LAYOUTS = [
    Layout(pipeline=2, shard=2, context=2, tensor=2, expert=4),
    Layout(shard=2, tensor=4, expert=8),
    Layout(pipeline=2, replica=2, shard=4, expert=2),
    Layout(tensor=2),
]


@pytest.mark.parametrize(
    ("model", "layout"), [*((DENSE, each) for each in LAYOUTS), *((MIXTURE, each) for each in EXPERT_LAYOUTS)]
)
def test_ranks_hold_the_model_together(model: ModelSpec, layout: Layout) -> None:
    """Every element once for each rank that has it whole: norms, key heads that ranks of tensor share, replicas."""
    job = a_job(model, layout)
    held = sum(predict_states(job, rank).parameters for rank in range(layout.world_size)) / 4 / layout.replica
    shapes = parameter_shapes(model)
    copies = 509 * 64 if model.tied_embeddings and layout.pipeline > 1 else 0
    alone = [name for name in shapes if "norm" in name or name.endswith("router.weight")]
    shared = [name for name in shapes if layout.tensor > 4 and (".key." in name or ".value." in name)]
    whole = sum(prod(shapes[name]) for name in (*alone, *shared))
    assert held == count_parameters(model) + copies + (layout.tensor - 1) * whole


@pytest.mark.parametrize(
    ("model", "layout"), [*((DENSE, each) for each in LAYOUTS), *((MIXTURE, each) for each in EXPERT_LAYOUTS)]
)
def test_the_fullest_rank_of_each_place_along_pipeline_is_the_part(model: ModelSpec, layout: Layout) -> None:
    job = a_job(model, layout)
    by_place: dict[int, list[float]] = {}
    for rank in range(layout.world_size):
        by_place.setdefault(layout.coordinates(rank)["pipeline"], []).append(predict_states(job, rank).parameters)
    for part in build_parts(job):
        assert 4 * part.local == max(by_place[part.rank])
        states = predict_states(job, 0).optimizer_states if part.rank == 0 else None
        assert states is None or states == 8 * part.local + 4 * part.tensors
    memory = predict_memory(job)
    assert memory.parameters in {4 * part.local for part in build_parts(job)}


def test_ranks_that_share_experts_and_ranks_that_do_not_by_hand() -> None:
    """Four ranks of shard with two each of eight experts of (36, 64): two ranks share each expert's 36 rows."""
    job = a_job(MIXTURE, Layout(shard=4, expert=2))
    routed = 4 * (2 * 18 * 64 + 32 * 36)
    # Norms; query and output; key and value; router; shared experts; and the routed ones.
    block = 2 * 16 + 2 * 16 * 64 + 2 * 8 * 64 + 2 * 64 + 2 * 9 * 64 + 16 * 36 + routed
    ends = 2 * 128 * 64 + 16
    # The last rank has two rows fewer of the 509 tokens at either end.
    assert predict_states(job, 0).parameters == 4 * (ends + 8 * block)
    assert predict_states(job, 3).parameters == 4 * (ends - 2 * 3 * 64 + 8 * block)


def test_first_stages_hold_more_microbatches() -> None:
    def activations(layout: Layout) -> float:
        return predict_memory(a_job(DENSE, layout, gpus="4xh100")).activations

    one = activations(Layout(replica=4))
    # Two of eight blocks on each rank, of four microbatches on the first.
    assert activations(Layout(pipeline=4)) == pytest.approx(one, rel=0.2)
    # With gpipe every microbatch is there at once, and the last stage keeps what comes before the head as well.
    assert 16 < activations(Layout(pipeline=4, schedule="gpipe")) / one < 26
    assert activations(Layout(pipeline=4, schedule="interleaved")) > 1.2 * activations(Layout(pipeline=4))


def test_a_divided_sequence_has_a_part_of_the_activations() -> None:
    whole = predict_memory(a_job(DENSE, Layout(shard=2), gpus="2xh100"))
    half = predict_memory(a_job(DENSE, Layout(context=2), gpus="2xh100"))
    assert half.activations == whole.activations / 2
    assert half.logits == whole.logits / 2
    # Parameters are sharded over both axes; a ring's keys and values come on top.
    assert half.parameters == whole.parameters
    assert half.communication_buffers > whole.communication_buffers


# --- Schedules -------------------------------------------------------------------------------------------------------


def even(layout: Layout, *, forward: float = 1.0, backward: float = 2.0) -> list[list[float]]:
    """Stages that are alike, whose weights take half of the backward pass."""
    half = backward / 2
    return [[forward, forward, backward, backward, half, half, half, half] for _ in range(stage_count(layout))]


def finish(layout: Layout, microbatches: int, seconds: list[list[float]], hop_s: float = 0.0) -> float:
    hops = [hop_s] * stage_count(layout)
    return replay_steadily(layout, build_timetable(layout, microbatches), seconds, hops).finish_s


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_equal_stages_wait_as_long_as_theory_says(schedule: Schedule, ranks: int) -> None:
    """Narayanan et al., arXiv:2104.04473: ranks - 1 forward and backward passes."""
    layout = Layout(pipeline=ranks, schedule=schedule)
    for microbatches in (ranks, 3 * ranks + 1, 50):
        assert finish(layout, microbatches, even(layout)) == pytest.approx((microbatches + ranks - 1) * 3)


@pytest.mark.parametrize("held", [2, 4])
def test_interleaving_shortens_the_wait_by_the_stages_a_rank_has(held: int) -> None:
    layout = Layout(pipeline=4, schedule="interleaved", stages_per_rank=held)
    assert finish(layout, 32, even(layout)) == pytest.approx((32 * held + 3) * 3)


@pytest.mark.parametrize(("schedule", "held"), SPLITS)
def test_weights_gradients_fill_the_wait(schedule: Schedule, held: int) -> None:
    layout = Layout(pipeline=4, schedule=schedule, stages_per_rank=held, zero=1)
    plain = Layout(pipeline=4, schedule="interleaved")
    wait = finish(layout, 32, even(layout)) - 32 * held * 3
    assert 0 <= wait < 0.7 * (finish(plain, 32, even(plain)) - 32 * 2 * 3)


@pytest.mark.parametrize(("schedule", "held"), [*WHOLE, *SPLITS])
@pytest.mark.parametrize("ranks", [2, 4])
def test_rounds_that_are_left_out_are_reckoned_right(schedule: Schedule, held: int, ranks: int) -> None:
    """Stages and transfers as uneven as can be."""
    chance = random.Random(20261123)
    layout = Layout(pipeline=ranks, schedule=schedule, stages_per_rank=held, zero=1)
    for _ in range(5):
        seconds = [[chance.uniform(1, 1.6) * s for s in kinds] for kinds in even(layout)]
        # As of real passes, both halves make a whole.
        seconds = [[1.3 * f, f, b, 1.2 * b, 0.6 * b, 0.7 * b, 0.4 * b, 0.5 * b] for _, f, b, *_ in seconds]
        hops = [chance.uniform(0, 0.4) for _ in seconds]
        microbatches = 16 * ranks
        short = replay_steadily(layout, build_timetable(layout, microbatches), seconds, hops)
        whole = replay(layout, build_timetable(layout, microbatches, rounds=16), seconds, hops)
        assert whole.steady and whole.timetable.repeats == 0
        assert short.finish_s == pytest.approx(whole.finish_s, rel=1e-3)


def test_transfers_show_only_where_they_are_waited_for() -> None:
    layout = Layout(pipeline=2)
    # With two microbatches under way each has to be back before the next but one is sent.
    assert finish(layout, 8, even(layout), hop_s=0.1) == pytest.approx(finish(layout, 8, even(layout)) + 8 / 2 * 0.2)
    roomy = Layout(pipeline=2, schedule="gpipe")
    assert finish(roomy, 8, even(roomy), hop_s=0.1) == pytest.approx(finish(roomy, 8, even(roomy)) + 0.2)


def predicted(*settings: str, gpus: str = "4x8xh100") -> Prediction:
    return predict(job_on(gpus, "llama3-70b", 8192, 64, "layout.shard=1", "layout.tensor=8", *settings))


def test_what_a_pipeline_waits_for_is_told_apart() -> None:
    plain = predicted("layout.pipeline=4")
    assert plain.pipeline is not None
    assert plain.step.bubble / plain.step_s == pytest.approx(3 / 67, rel=0.15)
    assert 0 < plain.step.comm_pipeline < plain.overlapped["pipeline"]
    # The head is worth two blocks of the last stage, and blocks are whole.
    assert plain.step.imbalance < 0.05 * plain.step_s
    uneven = predicted("layout.pipeline=4", "layout.stage_layers=[30,20,15,15]")
    assert uneven.step.imbalance > 0.2 * uneven.step_s
    assert uneven.step.bubble == pytest.approx(plain.step.bubble, rel=0.1)
    assert uneven.step.useful == plain.step.useful


def test_interleaving_trades_bubble_for_transfers() -> None:
    plain, turns = predicted("layout.pipeline=4"), predicted("layout.pipeline=4", "layout.schedule=interleaved")
    assert turns.step.bubble < 0.6 * plain.step.bubble
    moved = [p.step.comm_pipeline + p.overlapped["pipeline"] for p in (plain, turns)]
    # Seven hops where there were three.
    assert moved[1] / moved[0] == pytest.approx(7 / 3, rel=0.01)


def test_what_a_rank_runs_when_is_in_the_prediction() -> None:
    drawn = predicted("layout.pipeline=4", "layout.schedule=interleaved").pipeline
    assert drawn is not None
    assert (sum(drawn.stage_layers), len(drawn.stage_layers), drawn.stage_ranks) == (80, 8, (0, 1, 2, 3) * 2)
    microbatches = 64 - drawn.left_out
    for rank, passes in enumerate(drawn.ranks):
        assert Counter(p.kind for p in passes) == {"F": 2 * microbatches, "B": 2 * microbatches}
        assert {drawn.stage_ranks[p.stage] for p in passes} == {rank}
        assert all(one.end_s <= other.begin_s + 1e-9 for one, other in itertools.pairwise(passes))


def test_hops_of_a_pipeline_stay_in_a_node_where_they_can() -> None:
    cluster, layout = cluster_of("2x8xh100"), Layout(pipeline=4, tensor=4)
    near, far = (hop_seconds(layout, cluster, ranks, 1e9, GPU) for ranks in ((0, 1), (1, 2)))
    assert near == pytest.approx(1e9 / (0.72 * 450e9), rel=0.01)
    assert far == pytest.approx(1e9 / (0.72 * 50e9), rel=0.01)
    turning = Layout(pipeline=4, tensor=4, schedule="zbv")
    ranks = (rank_of_stage(turning, 3), rank_of_stage(turning, 4))
    assert hop_seconds(turning, cluster, ranks, 1e9, GPU) == 0


# --- The search ------------------------------------------------------------------------------------------------------


def test_models_of_hundreds_of_billions_get_pipelines() -> None:
    plan = build_plan(job_on("128x8xa100-80", "llama3.1-405b", 8192, 1024))
    piped = [p for p in plan.ranked if p.layout.pipeline > 1]
    assert piped
    assert all(p.memory.total() <= (1 - SPARE) * plan.capacity_bytes for p in plan.ranked)
    best = piped[0].layout
    assert best.tensor > 1 and best.world_size == 1024
    check_job(msgspec.structs.replace(job_on("128x8xa100-80", "llama3.1-405b", 8192, 1024), layout=best))
    # Listed in full: what waits is told apart.
    assert all(p.step.closes(p.step_s) and p.step.comm_pipeline > 0 for p in piped)


def test_every_layout_that_a_plan_lists_would_be_let_through() -> None:
    for model, gpus, sequence, batch, *settings in (
        ("llama3-70b", "8x8xh100", 8192, 64),
        ("deepseek-v3", "64x8xh100", 4096, 2048),
        ("qwen3-30b-a3b", "4x8xh200", 32768, 32),
        # Of ranks that are no power of two most leave some that cannot divide an expert's matrices.
        ("mixtral-8x7b", "3x8xh200", 4096, 48, "layout.shard=8"),
        ("qwen3-30b-a3b", "6xh200", 4096, 24, "layout.shard=2"),
    ):
        job = job_on(gpus, model, sequence, batch, *settings)
        plan = build_plan(job)
        assert plan.ranked
        for prediction in plan.ranked:
            check_job(msgspec.structs.replace(job, layout=prediction.layout))
            assert prediction.step.closes(prediction.step_s)


def test_a_grid_that_cannot_run_says_why() -> None:
    plan = build_plan(job_on("8xh100", "llama3-8b", 8192, 4, "layout.shard=4"))
    reasons = {r.layout.label(): r.reason for r in plan.rejected if r.memory is None}
    assert any("needs a microbatch for each rank" in reason for reason in reasons.values())
    assert ZOO["llama3-8b"].spec.layers == 32
