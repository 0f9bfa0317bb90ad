"""Pipeline schedules: the tables are torch's, run every pass once, cannot deadlock; stages are balanced."""

import itertools
from typing import Any, get_args

import msgspec
import pytest
from torch.distributed.pipelining import schedules as torchs

from meshwright.spec import Layout, ModelSpec, Recompute, SettingError, count_flops
from meshwright.spec.layout import Schedule
from meshwright.spec.schedule import (
    SPLIT_BACKWARD,
    Action,
    build_schedule,
    check_schedule,
    held_stages,
    rank_of_stage,
    stage_count,
)
from meshwright.spec.stages import split_layers, stage_costs

SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
CLASSES: dict[Schedule, str] = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved": "ScheduleInterleaved1F1B",
    "zero-bubble": "ScheduleInterleavedZeroBubble",
    "zbv": "ScheduleZBVZeroBubble",
    "dualpipev": "ScheduleDualPipeV",
}
LETTERS = {"F": "F", "B": "B", "I": "I", "W": "W"}


def sized(schedule: Schedule) -> list[tuple[int, int, int]]:
    """(pipeline, stages a rank, microbatches) that check_schedule lets through."""
    found: list[tuple[int, int, int]] = []
    for ranks, held, microbatches in itertools.product((2, 3, 4), (1, 2, 3), range(2, 13)):
        layout = Layout(pipeline=ranks, schedule=schedule, stages_per_rank=held, zero=1)
        try:
            check_schedule(layout, microbatches, layers=64)
        except SettingError:
            continue
        found.append((ranks, held, microbatches))
    return found


CASES = [(schedule, *sizes) for schedule in SCHEDULES for sizes in sized(schedule)]


class Stage:
    """As much of a torch stage as its schedules read to lay out their tables."""

    has_backward = True
    submod = None

    def __init__(self, index: int, ranks: int, stages: int) -> None:
        self.stage_index, self.group_rank, self.group_size, self.num_stages = index, index % ranks, ranks, stages
        self.is_first, self.is_last = index == 0, index == stages - 1
        self.stage_index_to_group_rank: dict[int, int] = {}


def torchs_table(schedule: Schedule, ranks: int, held: int, microbatches: int) -> list[list[Action]]:
    """What the installed torch runs, without its idle slots and transfers, pairs one after the other."""
    kind: Any = getattr(torchs, CLASSES[schedule])
    stages: Any = [Stage(index * ranks, ranks, ranks * held) for index in range(held)]
    if held == 1:
        built = kind(stages[0], microbatches, loss_fn=lambda: None)
        order = built._get_pipeline_order()
    else:
        built = kind(stages, microbatches, loss_fn=lambda: None)
        order = built.pipeline_order
    table: list[list[Action]] = []
    for rank in range(ranks):
        rows = [part for action in order[rank] if action for part in (action.sub_actions or (action,))]
        table.append(
            [
                Action(row.computation_type.value, row.stage_index, row.microbatch_index)
                for row in rows
                if row.computation_type.value in LETTERS
            ]
        )
    return table


@pytest.mark.parametrize(("schedule", "ranks", "held", "microbatches"), CASES)
def test_tables_are_torchs(schedule: Schedule, ranks: int, held: int, microbatches: int) -> None:
    table = build_schedule(Layout(pipeline=ranks, schedule=schedule, stages_per_rank=held), microbatches)
    theirs = torchs_table(schedule, ranks, held, microbatches)
    if schedule == "1f1b":
        # torch describes the last rank's forward passes as of microbatches 1 to n; what it runs are 0 to n - 1.
        described = theirs[-1]
        theirs[-1] = [a._replace(microbatch=a.microbatch - 1) if a.kind == "F" else a for a in described]
    assert [list(actions) for actions in table] == theirs


@pytest.mark.parametrize(("schedule", "ranks", "held", "microbatches"), CASES)
def test_every_pass_runs_once_on_the_rank_that_holds_its_stage(
    schedule: Schedule, ranks: int, held: int, microbatches: int
) -> None:
    layout = Layout(pipeline=ranks, schedule=schedule, stages_per_rank=held)
    table = build_schedule(layout, microbatches)
    actions = [action for rank in table for action in rank]
    assert len(actions) == len(set(actions))
    pairs = set(itertools.product(range(stage_count(layout)), range(microbatches)))
    of = {kind: {(a.stage, a.microbatch) for a in actions if a.kind == kind} for kind in "FBIW"}
    assert of["F"] == pairs
    assert of["I"] == of["W"]
    assert of["B"] | of["I"] == pairs and not of["B"] & of["I"]
    assert bool(of["I"]) == (schedule in SPLIT_BACKWARD)
    for rank, row in enumerate(table):
        assert {a.stage for a in row} == set(held_stages(layout, rank))
        assert all(rank_of_stage(layout, a.stage) == rank for a in row)


@pytest.mark.parametrize(("schedule", "ranks", "held", "microbatches"), CASES)
def test_no_order_waits_for_itself(schedule: Schedule, ranks: int, held: int, microbatches: int) -> None:
    layout = Layout(pipeline=ranks, schedule=schedule, stages_per_rank=held)
    table, last = build_schedule(layout, microbatches), stage_count(layout) - 1
    done: set[tuple[str, int, int]] = set()

    def ready(action: Action) -> bool:
        kind, stage, each = action
        if kind == "F":
            return stage == 0 or ("F", stage - 1, each) in done
        if kind == "W":
            return ("I", stage, each) in done
        return ("F", stage, each) in done and (stage == last or ("B", stage + 1, each) in done)

    position = [0] * ranks
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(table):
            while position[rank] < len(row) and ready(row[position[rank]]):
                kind, stage, each = row[position[rank]]
                # What the stage before waits for is there after either.
                done |= {(kind, stage, each), ("B", stage, each)} if kind == "I" else {(kind, stage, each)}
                position[rank] += 1
                moved = True
    assert position == [len(row) for row in table]


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "microbatches", "layers", "setting", "nearest"),
    [
        (
            Layout(schedule="gpipe"),
            4,
            8,
            'layout.schedule = "gpipe"',
            'layout.schedule = "1f1b", or layout.pipeline = 2',
        ),
        (
            Layout(stages_per_rank=2),
            4,
            8,
            "layout.stages_per_rank = 2",
            "layout.stages_per_rank = 0, or layout.pipeline = 2",
        ),
        (
            Layout(stage_layers=(8,)),
            4,
            8,
            "layout.stage_layers = [8]",
            "layout.stage_layers = [], or layout.pipeline = 2",
        ),
        (Layout(pipeline=4), 3, 8, "layout.pipeline = 4", "data.global_batch = 4, or layout.pipeline = 3"),
        (Layout(pipeline=4, shard=2, microbatch=2), 1, 8, "layout.pipeline = 4", "data.global_batch = 16"),
        (
            Layout(pipeline=4, schedule="dualpipev", zero=1),
            6,
            8,
            "layout.pipeline = 4",
            "data.global_batch = 8, or layout.pipeline = 3",
        ),
        (
            Layout(pipeline=4, schedule="interleaved"),
            9,
            8,
            'layout.schedule = "interleaved"',
            'data.global_batch = 8, or layout.schedule = "1f1b"',
        ),
        (
            Layout(pipeline=2, stages_per_rank=2),
            4,
            8,
            "layout.stages_per_rank = 2",
            'layout.stages_per_rank = 1, or layout.schedule = "interleaved"',
        ),
        (
            Layout(pipeline=2, schedule="zbv", stages_per_rank=3),
            4,
            8,
            "layout.stages_per_rank = 3",
            "layout.stages_per_rank = 2",
        ),
        (
            Layout(pipeline=2, schedule="interleaved", stages_per_rank=1),
            4,
            8,
            "layout.stages_per_rank = 1",
            "layout.stages_per_rank = 2",
        ),
        (Layout(pipeline=8), 8, 6, "layout.pipeline = 8", "layout.pipeline = 6"),
        (
            Layout(pipeline=2, schedule="interleaved", stages_per_rank=4),
            4,
            6,
            "layout.pipeline = 2",
            'layout.stages_per_rank = 3, or layout.schedule = "1f1b" with layout.stages_per_rank = 1',
        ),
        (
            Layout(pipeline=2, stage_layers=(3, 3, 2)),
            4,
            8,
            "layout.stage_layers = [3, 3, 2]",
            "layout.stage_layers = [4, 4], or layout.stage_layers = []",
        ),
        (
            Layout(pipeline=2, stage_layers=(8, 0)),
            4,
            8,
            "layout.stage_layers = [8, 0]",
            "layout.stage_layers = [4, 4], or layout.stage_layers = []",
        ),
        (
            Layout(pipeline=2, stage_layers=(4, 5)),
            4,
            8,
            "layout.stage_layers = [4, 5]",
            "layout.stage_layers = [4, 4], or layout.stage_layers = []",
        ),
        (Layout(pipeline=2, schedule="zbv", shard=2), 4, 8, "layout.zero = 3", "layout.zero = 1"),
        (Layout(pipeline=2, schedule="zero-bubble", context=2, zero=2), 4, 8, "layout.zero = 2", "layout.zero = 1"),
        *(
            (
                Layout(pipeline=2, schedule=schedule, tensor=2, async_tensor=True),
                4,
                8,
                "layout.async_tensor = true",
                'layout.async_tensor = false, or layout.schedule = "1f1b"',
            )
            for schedule in SPLIT_BACKWARD
        ),
    ],
)
def test_what_no_pipeline_can_do_is_refused(
    layout: Layout, microbatches: int, layers: int, setting: str, nearest: str
) -> None:
    with pytest.raises(SettingError) as caught:
        check_schedule(layout, microbatches, layers)
    assert (caught.value.setting, caught.value.nearest) == (setting, nearest)


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(pipeline=2), Layout(pipeline=2, schedule="zbv"), Layout(pipeline=2, tensor=2, async_tensor=True)],
)
def test_what_works_is_let_through(layout: Layout) -> None:
    check_schedule(layout, 4, 8)


# --- Stages ----------------------------------------------------------------------------------------------------------


def model_of(layers: int, vocabulary: int) -> ModelSpec:
    return ModelSpec(
        layers=layers, d_model=64, heads=4, kv_heads=2, head_dim=16, feed_forward=192, vocabulary=vocabulary
    )


@pytest.mark.parametrize("layers", [4, 6, 7, 9])
@pytest.mark.parametrize("vocabulary", [256, 1500, 5000])
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("recompute", ["none", 1, 3, "full"])
def test_the_slowest_stage_is_as_fast_as_can_be(
    layers: int, vocabulary: int, ranks: int, recompute: Recompute | int
) -> None:
    model, layout = model_of(layers, vocabulary), Layout(pipeline=ranks, recompute=recompute)
    blocks, first, last = stage_costs(model, layout, 128)

    def slowest(split: tuple[int, ...]) -> float:
        ends = [0, *itertools.accumulate(split)]
        costs = [sum(blocks[a:b]) for a, b in itertools.pairwise(ends)]
        costs[0] += first
        costs[-1] += last
        return max(costs)

    splits = [s for s in itertools.product(range(1, layers + 1), repeat=ranks) if sum(s) == layers]
    chosen = split_layers(model, layout, 128)
    assert chosen in splits
    assert slowest(chosen) == pytest.approx(min(map(slowest, splits)))


def test_the_head_takes_the_place_of_blocks() -> None:
    model = model_of(16, 10_000)
    flops = count_flops(model, 128)
    assert flops.head > 3 * (flops.block_matmul + flops.block_attention)
    split = split_layers(model, Layout(pipeline=4), 128)
    assert split[-1] == min(split) < min(split[1:-1])
    assert max(split[1:-1]) - min(split[1:-1]) <= 1


def test_stages_with_blocks_that_are_computed_again_have_fewer() -> None:
    """They are the first ones, and a forward pass dearer."""
    model = msgspec.structs.replace(model_of(32, 256), d_model=1024, heads=16, head_dim=64, feed_forward=4096)
    layout = Layout(pipeline=2, recompute=16)
    blocks, _, _ = stage_costs(model, layout, 128)
    assert blocks == pytest.approx([4 / 3 * blocks[-1]] * 16 + [blocks[-1]] * 16)
    assert split_layers(model, Layout(pipeline=2), 128) == (16, 16)
    assert split_layers(model, layout, 128) == (14, 18)


def test_a_split_that_is_given_is_kept() -> None:
    assert split_layers(model_of(8, 256), Layout(pipeline=2, stage_layers=(7, 1)), 128) == (7, 1)


def test_without_a_pipeline_there_is_one_stage() -> None:
    assert split_layers(model_of(8, 256), Layout(), 128) == (8,)
