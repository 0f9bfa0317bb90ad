"""What ranks along pipeline send each other in a step, in one order for all of them."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from meshwright.spec.layout import Layout
from meshwright.spec.schedule import Action, Pass, held_stages, rank_of_stage, stage_count

# How long passes take against each other, near enough to order their messages: a backward pass has two products for
# each of the forward's, and cut in two one for each half.
DURATIONS: dict[Pass, float] = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}


Direction = Literal["forward", "backward"]


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


def order_messages(layout: Layout, schedule: Sequence[Sequence[Action]]) -> tuple[Message, ...]:
    """All messages between ranks in a step, in the order in which passes of ordinary length make them.

    A rank that sends and receives in this order can wait for nobody who waits for it: of the messages not yet
    delivered the first one's source has only earlier ones before it, which are.
    """
    ends = walk(layout, schedule, lambda action: DURATIONS[action.kind])
    made = sorted((end, message) for action, end in ends.items() if (message := message_from(layout, action)))
    return tuple(message for _, message in made if message.source != message.target)


def walk(
    layout: Layout, schedule: Sequence[Sequence[Action]], seconds: Callable[[Action], float]
) -> dict[Action, float]:
    """When each pass ends that lasts `seconds`, each begun as soon as its rank has done what is before it and its input
    is made; messages take no time.

    Raises ValueError for a schedule that stops before its end.
    """
    ends: dict[Action, float] = {}
    # When the input of a stage's pass of a microbatch is there, by direction.
    ready: dict[tuple[bool, int, int], float] = {}
    last = stage_count(layout) - 1
    clock, position = [0.0] * len(schedule), [0] * len(schedule)
    waiting = set(range(len(schedule)))
    while waiting:
        moved = False
        for rank in sorted(waiting):
            while position[rank] < len(schedule[rank]):
                action = schedule[rank][position[rank]]
                first = action == Action("F", 0, action.microbatch) or action.kind == "W"
                if action.kind in ("B", "I") and action.stage == last:
                    input_s = ends.get(Action("F", last, action.microbatch))
                else:
                    input_s = 0.0 if first else ready.get((action.kind == "F", action.stage, action.microbatch))
                if input_s is None:
                    break
                ends[action] = clock[rank] = max(clock[rank], input_s) + seconds(action)
                step = 1 if action.kind == "F" else -1
                if action.kind != "W":
                    ready[(action.kind == "F", action.stage + step, action.microbatch)] = ends[action]
                position[rank] += 1
                moved = True
            if position[rank] == len(schedule[rank]):
                waiting.discard(rank)
        if waiting and not moved:
            raise ValueError(f"the schedule stops at {schedule[min(waiting)][position[min(waiting)]]}")
    return ends


def forward_only(layout: Layout) -> tuple[tuple[Action, ...], ...]:
    """What each rank runs where one batch goes through the model without a backward pass."""
    return tuple(tuple(Action("F", stage, 0) for stage in held_stages(layout, rank)) for rank in range(layout.pipeline))
