"""Between which ranks messages go that nobody names: pipelines of other trainers, of more than two stages.

Traces made by hand, as torch's pipelining leaves them: each batch of messages is noted part by part, then launched as
one kernel, which says nothing. Times are milliseconds; no GPU needed.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from test_causes import Foreign
from test_kineto import HOST

from meshwright.account import Transfer
from meshwright.explain.traces import explain_traces
from meshwright.record.kineto import measure_trace, read_trace

STAGES = 4
DEFAULT_GROUP = ("0", list(range(STAGES)))


class Stage(Foreign):
    """A rank of a pipeline."""

    def __init__(self, rank: int, group: tuple[str, list[int]] = DEFAULT_GROUP, *, world: int = STAGES) -> None:
        super().__init__()
        self.rank, self.world, self.group = rank, world, group

    def noted(self, kind: str, peer: int, at: float) -> None:
        """What is noted of a message before it is launched; peer: within the group."""
        name, ranks = self.group
        told: dict[str, Any] = {"Collective name": kind, "Process Group Name": name, "Process Group Ranks": str(ranks)}
        told |= {"In msg nelems": 1 << 20, "dtype": "BFloat16", "Dst Rank" if kind == "send" else "Src Rank": peer}
        self._add("cpu_op", "record_param_comms", at, at + 0.01, tid=HOST, **told)

    def message(self, start: float, end: float, *, launch: float, **told: Any) -> None:
        """The kernel of a batch of messages."""
        self.moved("SendRecv", start, end, launch=launch, **told)

    def write(self, folder: Path) -> Path:
        """The trace's file."""
        name, ranks = self.group
        groups = [{"pg_name": name, "pg_desc": "default_pg", "ranks": ranks}]
        beside = {"rank": self.rank, "world_size": self.world, "pg_config": groups}
        path = folder / f"rank-{self.rank}.json"
        path.write_text(json.dumps({"distributedInfo": beside, "traceEvents": self.events}))
        return path

    def transfers(self, folder: Path) -> list[Transfer]:
        """Those of the last step."""
        steps, _ = measure_trace(read_trace(self.write(folder)))
        return list(steps[-1].measured.transfers)


def middle(group: tuple[str, list[int]] = DEFAULT_GROUP, *, rank: int = 1, world: int = STAGES) -> Stage:
    """The second stage of four: it takes from the first, passes on to the third and takes its gradients, passes these
    on with a second batch taken."""
    stage = Stage(rank, group, world=world)
    stage.noted("recv", 0, 10.1)
    stage.message(12, 14, launch=10.2)
    stage.noted("send", 2, 10.3)
    stage.message(14, 15, launch=10.4)
    stage.noted("recv", 2, 10.5)
    stage.message(15, 17, launch=10.6)
    stage.noted("send", 0, 10.7)
    stage.noted("recv", 0, 10.72)
    stage.message(17, 19, launch=10.8)
    stage.kernel("last", 19, 20, launch=10.9)
    return stage


def test_messages_go_between_the_ranks_that_were_noted(tmp_path: Path) -> None:
    found = middle().transfers(tmp_path)
    assert [(one.purpose, one.ranks, one.index) for one in found] == [
        ("pipeline", (0, 1), 1),
        ("pipeline", (1, 2), 1),
        ("pipeline", (1, 2), 2),
        ("pipeline", (0, 1), 2),
    ]


def test_ranks_are_noted_as_their_group_counts_them(tmp_path: Path) -> None:
    """The second of four pipelines' ranks of one world, by a group's own name."""
    found = middle(("21", [1, 3, 5, 7]), rank=3, world=8).transfers(tmp_path)
    assert [one.ranks for one in found] == [(1, 3), (3, 5), (3, 5), (1, 3)]


def test_what_was_sent_is_known(tmp_path: Path) -> None:
    steps, _ = measure_trace(read_trace(middle().write(tmp_path)))
    assert steps[-1].detail is not None
    sizes = {group.ranks: group.sent_bytes for group in steps[-1].detail.groups}
    assert sizes == {(0, 1): 2.0 * (1 << 20), (1, 2): 2.0 * (1 << 20)}


def test_a_batch_for_several_ranks_meets_none_of_them(tmp_path: Path) -> None:
    stage = Stage(1)
    stage.noted("send", 0, 10.1)
    stage.noted("send", 2, 10.2)
    stage.message(12, 14, launch=10.3)
    stage.noted("send", 2, 10.4)
    stage.message(14, 15, launch=10.5)
    stage.kernel("last", 15, 20, launch=10.9)
    assert [one.ranks for one in stage.transfers(tmp_path)] == [(), (1, 2)]


@pytest.mark.parametrize(("group", "known"), [(DEFAULT_GROUP, ()), (("0", [0, 1]), (0, 1))])
def test_without_notes_two_ranks_alone_are_known(
    tmp_path: Path, group: tuple[str, list[int]], known: tuple[int, ...]
) -> None:
    stage = Stage(1, group, world=len(group[1]))
    stage.message(12, 14, launch=10.3)
    stage.kernel("last", 15, 20, launch=10.9)
    assert [one.ranks for one in stage.transfers(tmp_path)] == [known]


def test_stages_wait_for_the_one_before(tmp_path: Path) -> None:
    """The first computes for 4 ms of the step, which begins at 12; the second waits for it, the third for both."""
    first, second, third = Stage(0, world=3), Stage(1, world=3), Stage(2, world=3)
    first.kernel("work", 12, 16, launch=10.05)
    first.noted("send", 1, 10.1)
    first.message(16, 17, launch=10.2)
    first.kernel("last", 17, 20, launch=10.9)
    second.noted("recv", 0, 10.1)
    second.message(10.5, 17, launch=10.2)
    second.kernel("work", 17, 19, launch=10.3)
    second.noted("send", 2, 10.4)
    second.message(19, 20, launch=10.5)
    third.noted("recv", 1, 10.1)
    third.message(10.5, 20, launch=10.2)
    third.kernel("last", 20, 21, launch=10.3)
    found = explain_traces([stage.write(tmp_path) for stage in (first, second, third)])
    assert found.step is not None
    waited = {rank: (one.imbalance + one.bubble) * 1e3 for rank, one in found.step.ranks.items()}
    sent = {rank: one.comm_pipeline * 1e3 for rank, one in found.step.ranks.items()}
    assert waited == {0: 0.0, 1: pytest.approx(4.0), 2: pytest.approx(7.0)}
    assert sent == {0: pytest.approx(1.0), 1: pytest.approx(2.0), 2: pytest.approx(1.0)}
