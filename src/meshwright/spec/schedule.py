"""Pipeline schedules as data: who holds which stage, and the order in which each rank runs its passes."""

from typing import Literal, NamedTuple

from meshwright.spec.layout import Layout, Schedule
from meshwright.spec.model import ModelSpec

# F: a stage's forward pass of a microbatch. B: its backward pass, which zero-bubble schedules cut in two:
# I, the gradient of the stage's input, which the stage before waits for, and W, the gradients of its weights.
Pass = Literal["F", "B", "I", "W"]
# The schedules whose backward passes are cut in two, and those whose second stages run back up the ranks.
SPLIT_BACKWARD: tuple[Schedule, ...] = ("zero-bubble", "zbv", "dualpipev")
TURNING: tuple[Schedule, ...] = ("zbv", "dualpipev")


class Action(NamedTuple):
    """One pass of one microbatch through one stage."""

    kind: Pass
    stage: int
    microbatch: int


def stages_per_rank(layout: Layout) -> int:
    """Stages that a rank of the pipeline axis holds."""
    return layout.stages_per_rank or (1 if layout.schedule in ("gpipe", "1f1b") else 2)


def stage_count(layout: Layout) -> int:
    """Stages of the whole model."""
    return layout.pipeline * stages_per_rank(layout)


def rank_of_stage(layout: Layout, stage: int) -> int:
    """The rank along pipeline that holds a stage: in turns, or down the ranks and back up."""
    turn, place = divmod(stage, layout.pipeline)
    return layout.pipeline - 1 - place if layout.schedule in TURNING and turn % 2 else place


def held_stages(layout: Layout, rank: int) -> tuple[int, ...]:
    """The stages that a rank along pipeline holds, first to last."""
    return tuple(stage for stage in range(stage_count(layout)) if rank_of_stage(layout, stage) == rank)


def build_schedule(layout: Layout, microbatches: int) -> tuple[tuple[Action, ...], ...]:
    """What each rank along pipeline runs in a step, in order."""
    ranks = range(layout.pipeline)
    made: list[tuple[Action, ...]] = []
    for rank in ranks:
        warm = microbatches if layout.schedule == "gpipe" else min(microbatches, layout.pipeline - 1 - rank)
        actions = [Action("F", rank, m) for m in range(warm)]
        for m in range(warm, microbatches):
            actions += [Action("F", rank, m), Action("B", rank, m - warm)]
        actions += [Action("B", rank, m) for m in range(microbatches - warm, microbatches)]
        made.append(tuple(actions))
    return tuple(made)


def split_layers(model: ModelSpec, layout: Layout, sequence: int) -> tuple[int, ...]:
    """Blocks of each stage, first to last."""
    if layout.stage_layers:
        return layout.stage_layers
    stages = stage_count(layout)
    return tuple(model.layers // stages + (stage < model.layers % stages) for stage in range(stages))
