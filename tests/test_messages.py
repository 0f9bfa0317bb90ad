"""The order of a pipeline's messages: every rank can send and receive in it, and nobody waits for ever.

gloo would forgive any order; NCCL, where messages share a stream, does not.
"""

from collections import deque
from collections.abc import Sequence

import pytest
from test_schedule import CASES

from meshwright.spec import Action, Layout, Message, build_schedule, forward_only, message_from, order_messages
from meshwright.spec.layout import Schedule
from meshwright.spec.messages import Input, input_of
from meshwright.spec.schedule import rank_of_stage

Table = Sequence[Sequence[Action]]


class Rank:
    """One rank that sends and receives strictly in order: an operation begins when the one before it is over, and is
    over when its partner has begun the same one."""

    def __init__(self, rank: int, actions: Sequence[Action], messages: Sequence[Message]) -> None:
        self.rank, self.left = rank, deque(actions)
        self.unposted = deque(message for message in messages if rank in (message.source, message.target))
        self.posted: deque[Message] = deque()
        self.there: set[Input] = set()
        self.post_receives()

    def post_receives(self) -> None:
        """Receives wait for nothing, so they are posted as soon as it is their turn."""
        while self.unposted and self.unposted[0].target == self.rank:
            self.posted.append(self.unposted.popleft())

    def run(self, layout: Layout) -> bool:
        """Run the passes whose input is there; whether any was. What one makes must be what is to be sent next."""
        before = len(self.left)
        while self.left and ((needed := input_of(layout, self.left[0])) is None or needed in self.there):
            message = message_from(layout, self.left.popleft())
            if message is not None and message.source == message.target:
                self.there.add(message[:3])
            elif message is not None:
                assert self.unposted.popleft() == message
                self.posted.append(message)
                self.post_receives()
        return len(self.left) < before


def deliver(layout: Layout, table: Table, messages: Sequence[Message]) -> list[Rank]:
    """Run all ranks until none can go on."""
    ranks = [Rank(number, actions, messages) for number, actions in enumerate(table)]
    moved = True
    while moved:
        moved = False
        for rank in ranks:
            moved |= rank.run(layout)
            while rank.posted:
                message = rank.posted[0]
                other = ranks[message.source if message.target == rank.rank else message.target]
                if not other.posted or other.posted[0] != message:
                    break
                rank.posted.popleft()
                other.posted.popleft()
                ranks[message.target].there.add(message[:3])
                moved = True
    return ranks


def assert_delivered(layout: Layout, table: Table) -> None:
    """Fail where a rank is stuck, or where a message is not there once for one sender and one receiver."""
    messages = order_messages(layout, table)
    made = [message for actions in table for action in actions if (message := message_from(layout, action))]
    assert sorted(messages) == sorted(message for message in made if message.source != message.target)
    for message in messages:
        beside = -1 if message.direction == "forward" else 1
        assert message.target == rank_of_stage(layout, message.stage)
        assert message.source == rank_of_stage(layout, message.stage + beside)
    for rank in deliver(layout, table, messages):
        assert not rank.left and not rank.unposted and not rank.posted, rank.rank


@pytest.mark.parametrize(("schedule", "ranks", "held", "microbatches"), CASES)
def test_every_rank_can_keep_to_one_order(schedule: Schedule, ranks: int, held: int, microbatches: int) -> None:
    layout = Layout(pipeline=ranks, schedule=schedule, stages_per_rank=held)
    assert_delivered(layout, build_schedule(layout, microbatches))
    assert_delivered(layout, forward_only(layout))


def test_an_order_in_which_ranks_wait_for_each_other_is_noticed() -> None:
    """All states before all gradients: with 1f1b the first rank waits for a gradient, the last for a state."""
    layout = Layout(pipeline=2)
    table = build_schedule(layout, 4)
    messages = sorted(order_messages(layout, table), key=lambda message: message.direction, reverse=True)
    assert all(rank.left for rank in deliver(layout, table, messages))
