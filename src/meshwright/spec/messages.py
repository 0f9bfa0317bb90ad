"""What ranks along pipeline send each other in a step, in one order for all of them."""

from collections import deque
from collections.abc import Sequence
from typing import Literal, NamedTuple

from meshwright.spec.layout import Layout
from meshwright.spec.schedule import Action, Pass, held_stages, rank_of_stage, stage_count

# How long passes take against each other, near enough to order their messages: a backward pass has two products for
# each of the forward's, and cut in two one for each half.
DURATIONS: dict[Pass, float] = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}

Direction = Literal["forward", "backward"]
# What a pass waits for: the input of this stage's pass of this microbatch, in this direction.
Input = tuple[Direction, int, int]


class Message(NamedTuple):
    """What a stage's pass of a microbatch needs of its neighbour: going forward its input, going backward its output's
    gradient. source, target: ranks along pipeline."""

    direction: Direction
    stage: int
    microbatch: int
    source: int
    target: int


def message_from(layout: Layout, action: Action) -> Message | None:
    """What a pass makes for the stage after or before its own; None where there is none. It may be on the same rank."""
    if action.kind == "W":
        return None
    forward = action.kind == "F"
    stage = action.stage + (1 if forward else -1)
    if not 0 <= stage < stage_count(layout):
        return None
    source, target = rank_of_stage(layout, action.stage), rank_of_stage(layout, stage)
    return Message("forward" if forward else "backward", stage, action.microbatch, source, target)


def input_of(layout: Layout, action: Action) -> Input | None:
    """What a pass needs of the stage before or after its own; None where that is nothing."""
    if action.kind == "F":
        return ("forward", action.stage, action.microbatch) if action.stage > 0 else None
    if action.kind == "W" or action.stage == stage_count(layout) - 1:
        return None
    return "backward", action.stage, action.microbatch


def order_messages(layout: Layout, schedule: Sequence[Sequence[Action]]) -> tuple[Message, ...]:
    """All messages between ranks in a step, in the order in which passes of ordinary length make them.

    A rank that sends and receives in this order can wait for nobody who waits for it: of the messages not yet
    delivered the first one's source has only earlier ones before it, which are.
    """
    made = sorted(walk(layout, schedule).values())
    return tuple(message for _, message in made if message.source != message.target)


def walk(layout: Layout, schedule: Sequence[Sequence[Action]]) -> dict[Input, tuple[float, Message]]:
    """Every message with the moment when it is made, where passes last as DURATIONS says, each begun as soon as its
    rank has done what is before it and its input is made; messages take no time.

    Raises ValueError for a schedule that stops before its end.
    """
    made: dict[Input, tuple[float, Message]] = {}
    clock, left = [0.0] * len(schedule), [deque(actions) for actions in schedule]
    while any(left):
        before = sum(map(len, left))
        for rank, actions in enumerate(left):
            while actions and ((needed := input_of(layout, actions[0])) is None or needed in made):
                action = actions.popleft()
                input_s = 0.0 if needed is None else made[needed][0]
                clock[rank] = max(clock[rank], input_s) + DURATIONS[action.kind]
                if message := message_from(layout, action):
                    made[message[:3]] = clock[rank], message
        if sum(map(len, left)) == before:
            raise ValueError(f"the schedule stops at {next(actions[0] for actions in left if actions)}")
    return made


def forward_only(layout: Layout) -> tuple[tuple[Action, ...], ...]:
    """What each rank runs where one batch goes through the model without a backward pass."""
    return tuple(tuple(Action("F", stage, 0) for stage in held_stages(layout, rank)) for rank in range(layout.pipeline))
