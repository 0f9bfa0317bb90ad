"""Pipeline schedules as data: who holds which stage, and the order in which each rank runs its passes.

    gpipe        all forward passes, then all backward passes (Huang et al., arXiv:1811.06965)
    1f1b         as many forward passes as ranks follow, then one of each in turns (arXiv:2104.04473)
    interleaved  the same with several stages a rank, in rounds of microbatches (arXiv:2104.04473)
    zero-bubble  the same with backward passes cut in two, weights' gradients filling what was idle (arXiv:2401.10241)
    zbv          two stages a rank, down the ranks and back up, backward passes cut in two (arXiv:2405.15362)
    dualpipev    the same shape, forward and backward passes in pairs (arXiv:2412.19437, cut in half)

Tables equal those of the installed torch's `torch.distributed.pipelining`, where it has the schedule; a test says so.
"""

from collections import Counter, deque
from collections.abc import Iterable
from typing import Literal, NamedTuple

from meshwright.spec.errors import Offer, SettingError, as_toml
from meshwright.spec.layout import Layout, Schedule
from meshwright.spec.numbers import divisors

# F: a stage's forward pass of a microbatch. B: its backward pass, which zero-bubble schedules cut in two:
# I, the gradient of the stage's input, which the stage before waits for, and W, the gradients of its weights.
Pass = Literal["F", "B", "I", "W"]
# The schedules whose backward passes are cut in two, and those whose second stages run back up the ranks.
SPLIT_BACKWARD: tuple[Schedule, ...] = ("zero-bubble", "zbv", "dualpipev")
TURNING: tuple[Schedule, ...] = ("zbv", "dualpipev")
# Numbers that an error offers in the place of one, nearest first.
MOST_OFFERED = 64
# Stages that a rank can hold: the fewest, and the most (0: any number).
STAGES_PER_RANK: dict[Schedule, tuple[int, int]] = {
    "gpipe": (1, 1),
    "1f1b": (1, 1),
    "interleaved": (2, 0),
    "zero-bubble": (2, 0),
    "zbv": (2, 2),
    "dualpipev": (2, 2),
}


class Action(NamedTuple):
    """One pass of one microbatch through one stage."""

    kind: Pass
    stage: int
    microbatch: int


# What each rank along pipeline runs in a step, in order.
Table = tuple[tuple[Action, ...], ...]


def stages_per_rank(layout: Layout) -> int:
    """Stages that a rank of the pipeline axis holds."""
    return layout.stages_per_rank or (STAGES_PER_RANK[layout.schedule][0] if layout.pipeline > 1 else 1)


def stage_count(layout: Layout) -> int:
    """Stages of the whole model."""
    return layout.pipeline * stages_per_rank(layout)


def rank_of_stage(layout: Layout, stage: int) -> int:
    """The rank along pipeline that holds a stage: in turns, or down the ranks and back up."""
    turn, place = divmod(stage, layout.pipeline)
    return layout.pipeline - 1 - place if layout.schedule in TURNING and turn % 2 else place


def held_stages(layout: Layout, rank: int) -> tuple[int, ...]:
    """The stages that a rank along pipeline holds, first to last."""
    ranks, stages = layout.pipeline, stage_count(layout)
    if layout.schedule not in TURNING:
        return tuple(range(rank, stages, ranks))
    # Down the ranks and back up, each second turn.
    return tuple(turn + (ranks - 1 - rank if turn // ranks % 2 else rank) for turn in range(0, stages, ranks))


def build_schedule(layout: Layout, microbatches: int) -> Table:
    """What each rank along pipeline runs in a step, in order. For layouts that check_schedule lets through."""
    return tuple(rank_schedule(layout, rank, microbatches) for rank in range(layout.pipeline))


def rank_schedule(layout: Layout, rank: int, microbatches: int) -> tuple[Action, ...]:
    """The same of one of them."""
    if layout.schedule == "zbv":
        return zbv_rank(layout, rank, microbatches)
    if layout.schedule == "dualpipev":
        return dualpipev_rank(layout, rank, microbatches)
    return alternating_rank(layout, rank, microbatches)


def alternating_rank(layout: Layout, rank: int, microbatches: int) -> tuple[Action, ...]:
    """Some forward passes ahead, then forward and backward in turns, then the remaining backward passes.

    The schedules differ in how many forward passes go ahead. Cut in two, a backward pass sends back its input's
    gradient first; its weights' follow `rank` passes later, for so much longer does a later rank wait at the end.
    """
    held = held_stages(layout, rank)
    after = layout.pipeline - 1 - rank
    # Microbatches go through a rank's first stage a round at a time, then through its second, and so on.
    rounds = max(1, microbatches // layout.pipeline)
    per_round = microbatches // rounds
    split = layout.schedule in SPLIT_BACKWARD
    lead = (len(held) - 1) * per_round
    lead += after if split or len(held) == 1 else 2 * after
    ahead = microbatches if layout.schedule == "gpipe" else min(lead, len(held) * microbatches)

    def in_rounds(stages: tuple[int, ...]) -> list[tuple[int, int]]:
        return [
            (stage, each)
            for start in range(0, microbatches, per_round)
            for stage in stages
            for each in range(start, min(start + per_round, microbatches))
        ]

    forward = [Action("F", *pair) for pair in in_rounds(held)]
    backward = in_rounds(held[::-1])
    actions = forward[:ahead]
    for index, pair in enumerate(backward):
        actions += forward[ahead + index : ahead + index + 1]
        actions.append(Action("I" if split else "B", *pair))
        if split and index >= rank:
            actions.append(Action("W", *backward[index - rank]))
    if split:
        actions += [Action("W", *pair) for pair in backward[len(backward) - rank :]]
    return tuple(actions)


def zbv_rank(layout: Layout, rank: int, microbatches: int) -> tuple[Action, ...]:
    """ZB-V's phases for one rank. Passes of microbatches that a short step has not got are left out."""
    ranks, after = layout.pipeline, layout.pipeline - 1 - rank
    filled = max(microbatches, 2 * ranks - 1)
    phases = [
        # Until the last rank has turned the first microbatch round, and it has come back here.
        (2 * after + 1, "F0"),
        (rank, "F1 F0"),
        (after + 1, "F1 I1 W1"),
        # All of both stages, while there are microbatches to begin with; then what has begun.
        (filled - ranks - after, "F0 I0 W0 F1 I1 W1"),
        (after, "I0 W0 F1 I1 W1"),
        # The way out: inputs' gradients, which others wait for, before weights'.
        (rank, "I0 I1"),
        (after + 1, "I0 W0"),
        (rank, "W1"),
        (rank, "W0"),
    ]
    actions = run_phases(held_stages(layout, rank), phases)
    return tuple(action for action in actions if action.microbatch < microbatches)


def dualpipev_rank(layout: Layout, rank: int, microbatches: int) -> tuple[Action, ...]:
    """DualPipe-V's phases for one rank. Where it runs a forward and a backward pass as one, they stand in turn."""
    after = layout.pipeline - 1 - rank
    turns = ["B1", "B0"] * (rank + 1)
    # Half of the last backward passes are cut in two: what is left of them fills the way out.
    ending = " ".join([*turns[: rank + 1], *(turn.replace("B", "I") for turn in turns[rank + 1 :])])
    phases = [
        (2 * after, "F0"),
        (rank + 1, "F0 F1"),
        (after, "I1 W F1"),
        (microbatches - layout.pipeline - after, "F0 B1 F1 B0"),
        (after, "B1 F1 B0"),
        (1, ending),
        (after, "W I0"),
        (rank + 1, "W"),
    ]
    return tuple(run_phases(held_stages(layout, rank), phases))


def run_phases(held: tuple[int, ...], phases: Iterable[tuple[int, str]]) -> list[Action]:
    """Phases (how often, which passes of the rank's first and second stage) as actions, microbatches in order.

    "W" without a stage is the oldest that is due.
    """
    begun: Counter[tuple[str, str]] = Counter()
    due: deque[Action] = deque()
    actions: list[Action] = []
    for times, passes in phases:
        for word in passes.split() * times:
            if word == "W":
                actions.append(due.popleft())
                continue
            kind, which = word
            # A backward pass, whole or its first half, comes once for each microbatch.
            counted = "I" if kind == "B" else kind
            stage, microbatch = held[int(which)], begun[counted, which]
            begun[counted, which] += 1
            actions.append(Action(pass_of(kind), stage, microbatch))
            if kind == "I":
                due.append(Action("W", stage, microbatch))
    return actions


def pass_of(letter: str) -> Pass:
    """A pass by its letter."""
    passes: dict[str, Pass] = {"F": "F", "B": "B", "I": "I", "W": "W"}
    return passes[letter]


def check_schedule(layout: Layout, microbatches: int, layers: int, *, short: bool = False) -> None:
    """Raise SettingError where the pipeline's settings, a step's microbatches and the model's blocks do not fit.

    microbatches: that a rank runs in a step. short: whether 1f1b may run fewer of them than there are ranks.
    """
    if layout.pipeline == 1:
        check_no_pipeline(layout)
        return
    check_stages(layout, layers)
    if not (short and layout.schedule == "1f1b"):
        check_microbatches(layout, microbatches)
    if layout.schedule in SPLIT_BACKWARD and layout.zero > 1 and layout.parameter_shards > 1:
        # Parameters that are offloaded are not kept gathered either.
        offloaded = layout.offload == "parameters"
        gathered: Offer = {"layout.zero": 1} | ({"layout.offload": "optimizer"} if offloaded else {})
        raise SettingError(
            f"layout.zero = {layout.zero}",
            f"{layout.schedule} computes weights' gradients after their parameters would be freed",
            offers=([gathered], [plain_schedule(layout)]) if offloaded else [[gathered]],
        )


def check_microbatches(layout: Layout, microbatches: int) -> None:
    """Raise SettingError where a step has too few microbatches for the schedule, or not so many rounds of them."""
    fewest = stage_count(layout) if layout.schedule == "dualpipev" else layout.pipeline
    if microbatches < fewest:
        what = "stage" if layout.schedule == "dualpipev" else "rank of the pipeline"
        longest = microbatches * layout.pipeline // fewest
        raise SettingError(
            f"layout.pipeline = {layout.pipeline}",
            f"{layout.schedule} needs a microbatch for each {what}, {fewest}, and a step has {microbatches}",
            offers=(
                more_microbatches(layout, microbatches, fewest),
                [{"layout.pipeline": ranks} for ranks in range(longest, 1, -1)[:MOST_OFFERED]],
            ),
        )
    if layout.schedule in ("interleaved", "zero-bubble") and microbatches % (microbatches // layout.pipeline):
        rounds = microbatches // layout.pipeline
        near = min(rounds * layout.pipeline, rounds * (microbatches // rounds), key=lambda n: microbatches - n)
        raise SettingError(
            f'layout.schedule = "{layout.schedule}"',
            f"runs {microbatches} microbatches in {rounds} equal rounds of at least layout.pipeline = "
            f"{layout.pipeline}, and {rounds} does not divide them",
            offers=(more_microbatches(layout, microbatches, near), [plain_schedule(layout)]),
        )
    if layout.schedule in SPLIT_BACKWARD and layout.async_tensor:
        reason = f"{layout.schedule} runs uncompiled, and it is the compiler that hides transfers"
        raise SettingError(
            "layout.async_tensor = true", reason, 'layout.async_tensor = false, or layout.schedule = "1f1b"'
        )


def more_microbatches(layout: Layout, microbatches: int, wanted: int) -> list[Offer]:
    """Smaller microbatches, of which the same batch has as many as are needed; then batches of `wanted` and more."""
    share = microbatches * layout.microbatch
    sizes = [size for size in divisors(share)[::-1] if size < layout.microbatch and share // size >= wanted]
    batches = [(wanted + more) * layout.data_size * layout.microbatch for more in range(layout.pipeline)[:MOST_OFFERED]]
    return [{"layout.microbatch": size} for size in sizes] + [{"data.global_batch": size} for size in batches]


def plain_schedule(layout: Layout) -> Offer:
    """The schedule that needs least, with a stage on each rank."""
    held: Offer = {"layout.stages_per_rank": 1} if layout.stages_per_rank > 1 else {}
    return {"layout.schedule": "1f1b"} | held


def check_no_pipeline(layout: Layout) -> None:
    """Raise SettingError for a setting that would do nothing without a pipeline."""
    plain = Layout()
    settings = ("schedule", "stages_per_rank", "stage_layers")
    given = [setting for setting in settings if getattr(layout, setting) != getattr(plain, setting)]
    if given:
        left_out = {f"layout.{setting}": getattr(plain, setting) for setting in given}
        reason = "means nothing with layout.pipeline = 1"
        setting = f"layout.{given[0]} = {as_toml(getattr(layout, given[0]))}"
        raise SettingError(setting, reason, offers=([left_out], [{"layout.pipeline": 2}]))


def check_stages(layout: Layout, layers: int) -> None:
    """Raise SettingError for stages that the schedule, or a model of so many blocks, cannot have."""
    held, ranks = stages_per_rank(layout), layout.pipeline
    fewest, most = STAGES_PER_RANK[layout.schedule]
    if held < fewest or (most and held > most):
        wants = f"{fewest} of them" if fewest == most else f"at least {fewest}"
        raise SettingError(
            f"layout.stages_per_rank = {held}",
            f"{layout.schedule} gives each rank {wants}",
            offers=(
                [{"layout.stages_per_rank": fewest}],
                [{"layout.schedule": "interleaved"}] if most == 1 and held > 1 else [],
            ),
        )
    stages = stage_count(layout)
    if stages > layers:
        fewer = [{"layout.stages_per_rank": number} for number in range(layers // ranks, fewest - 1, -1)[:MOST_OFFERED]]
        lengths = range(layers // held, 0 if held == 1 else 1, -1)[:MOST_OFFERED]
        shorter = [{"layout.pipeline": number} for number in lengths]
        raise SettingError(
            f"layout.pipeline = {ranks}",
            f"makes {stages} stages ({held} a rank) of model.layers = {layers}",
            offers=(fewer if held > fewest else [], shorter, [plain_schedule(layout)] if held > 1 else []),
        )
    if layout.stage_layers:
        check_stage_layers(layout, layers)


def check_stage_layers(layout: Layout, layers: int) -> None:
    """Raise SettingError where the stages that are given are not those of the pipeline."""
    given, stages, held = list(layout.stage_layers), stage_count(layout), stages_per_rank(layout)
    reason = ""
    if len(given) != stages:
        reason = f"names {len(given)} stages, and there are {stages} ({held} on each of {layout.pipeline} ranks)"
    elif min(given) < 1:
        reason = "each stage needs at least one block"
    elif sum(given) != layers:
        reason = f"sums to {sum(given)}, and model.layers = {layers}"
    if reason:
        even = [layers // stages + (stage < layers % stages) for stage in range(stages)]
        ways: tuple[list[Offer], list[Offer]] = ([{"layout.stage_layers": even}], [{"layout.stage_layers": ()}])
        raise SettingError(f"layout.stage_layers = {given}", reason, offers=ways)
