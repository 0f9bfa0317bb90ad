"""The measured account closes, and a delay of known length is found in its bucket, on its rank, with its culprit."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from jobs import tiny_job
from ranks import run_ranks
from training import new_run, train_rank

from meshwright.account import CLOSING_TOLERANCE
from meshwright.data import Batches
from meshwright.explain import Explanation, MeasuredSteps, explain_run
from meshwright.record import RunFolder, Span, Step, read_events
from meshwright.spec import count_flops
from meshwright.trace.recorder import useful_seconds
from meshwright.train import loop

# Injected delays, and how far off a measured one may be: ranks share two cores with whatever else runs here.
DELAY_S = 0.4
BOUND_S = 0.1
SLOW = 1
# Steps before the first profiled one, which need no delay.
WARM = 3


def late(rank: int, seconds: float, then: Callable[..., Any], *, first: int = WARM) -> Callable[..., Any]:
    """A function that one rank reaches late, from its call number `first` on."""
    calls = 0

    def delayed(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        if dist.get_rank() == rank and calls >= first:
            time.sleep(seconds)
        calls += 1
        return then(*arguments, **options)

    return delayed


def late_passes(rank: int, seconds: float) -> type[loop.Passes]:
    """A step's passes, each forward one of which one rank begins late."""
    forward = late(rank, seconds, loop.Passes.forward)
    return type("LatePasses", (loop.Passes,), {"forward": forward})


def late_batches(rank: int, seconds: float) -> Callable[..., Any]:
    """build_batches whose batches come late on one rank."""

    class LateBatches(Batches):
        def next(self, step: int) -> Any:
            if dist.get_rank() == rank and step >= WARM:
                time.sleep(seconds)
            return super().next(step)

    def build(*arguments: Any) -> Batches:
        batches = build_batches(*arguments)
        batches.__class__ = LateBatches
        return batches

    build_batches = loop.build_batches
    return build


def traced(folder: Path, layout: dict[str, Any], patches: dict[str, Any] | None = None, **sections: Any) -> RunFolder:
    """A run of 6 steps, two of them profiled, one microbatch a step."""
    data = layout.get("replica", 1) * layout.get("shard", 1)
    ranks = data * layout.get("pipeline", 1) * layout.get("tensor", 1) * layout.get("context", 1)
    job = tiny_job(
        folder,
        processes=ranks,
        layout=layout | {"microbatch": 2},
        run={"steps": 6},
        **({"trace": {"every_steps": 2}, "data": {"global_batch": 2 * data, "sequence": 64}} | sections),
    )
    run, attempt = new_run(job)
    run_ranks(ranks, train_rank, job, run, attempt, patches)
    return run


def measured(run: RunFolder) -> MeasuredSteps:
    step = explain_run(run).step
    assert step is not None
    assert step.steps == (3, 5)
    return step


def about(seconds: float) -> Any:
    return pytest.approx(seconds, abs=BOUND_S)


def closing(folder: Path, layout: dict[str, Any], **sections: dict[str, Any]) -> tuple[RunFolder, MeasuredSteps]:
    """A run whose account closes, or the third that does not: a process that the machine puts aside between two phases
    is nobody's doing here, and does not happen every time."""
    tries = 0
    while True:
        run = traced(folder / str(tries), layout, **sections)
        step = measured(run)
        tries += 1
        if step.closes or tries == 3:
            return run, step


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"replica": 2},
        {"shard": 2, "zero": 2},
        {"replica": 2, "shard": 2},
        {"recompute": "full"},
        {"recompute": "selective"},
        {"tensor": 2},
        {"shard": 2, "tensor": 2, "recompute": 1},
        {"context": 2},
        {"shard": 2, "context": 2, "context_form": "all-to-all"},
    ],
    ids=lambda v: "-".join(f"{k}{n}" for k, n in v.items()) or "one",
)
def test_the_account_closes(tmp_path: Path, layout: dict[str, Any]) -> None:
    # Larger than elsewhere: opening an annotation takes some 40 us, and a step on a busy machine is put aside at times.
    data = layout.get("replica", 1) * layout.get("shard", 1)
    ranks = data * layout.get("tensor", 1) * layout.get("context", 1)
    model = {"d_model": 128, "feed_forward": 256}
    run, step = closing(tmp_path, layout, data={"global_batch": 2 * data, "sequence": 512}, model=model)
    assert step.closes and step.poor_share < CLOSING_TOLERANCE
    assert set(step.ranks) == set(range(ranks))
    for lines in read_events(run, 0).values():
        for line in lines:
            if isinstance(line, Step):
                assert line.measured.account.total() == pytest.approx(line.measured.wall_s, rel=1e-6)
    for account in step.ranks.values():
        rows = dict(account.rows())
        assert rows["useful"] > 0 and rows["optimizer"] > 0 and rows["host"] > 0
        # What the layout does not have takes no time; what it has takes some, but for its part of the waiting.
        assert (rows["comm.replica"] > 0) == ("replica" in layout)
        assert (rows["comm.shard"] > 0) == ("shard" in layout or "context" in layout)
        assert (rows["comm.context"] > 0) == ("context" in layout)
        assert (rows["comm.tensor"] > 0) == ("tensor" in layout)
        assert (rows["recompute"] > 0) == ("recompute" in layout)
        assert not any(rows[f"comm.{axis}"] for axis in ("expert", "pipeline"))
        assert rows["imbalance"] == rows["bubble"] == 0


@pytest.mark.parametrize("layout", [{"replica": 2}, {"shard": 2}, {"tensor": 2}], ids=["replica", "shard", "tensor"])
def test_a_slow_rank_is_found(tmp_path: Path, layout: dict[str, int]) -> None:
    patches = {"Passes": late_passes(SLOW, DELAY_S)}
    # 4 heads, and columns that 2 ranks can divide.
    run = traced(tmp_path, layout, patches, model={"feed_forward": 92})
    step = measured(run)
    other, slow = step.ranks[1 - SLOW], step.ranks[SLOW]
    assert other.straggler == about(DELAY_S)
    assert step.blame[1 - SLOW][SLOW] == about(DELAY_S)
    assert slow.host - other.host == about(DELAY_S)
    assert slow.straggler < BOUND_S and other.input < BOUND_S
    # Waiting is no transfer.
    assert sum(seconds for name, seconds in other.rows() if name.startswith("comm.")) < DELAY_S
    # By itself a rank does not know that it waits: its longest stretch without an operator is in a transfer.
    steps = [line for line in read_events(run, 0)[1 - SLOW] if isinstance(line, Step)]
    gaps = [gap for line in steps if line.detail is not None for gap in line.detail.gaps]
    longest = max(gaps, key=lambda gap: gap.seconds)
    assert longest.bucket == f"comm.{next(iter(layout))}" and longest.seconds == about(DELAY_S)
    (advice,) = [advice for advice in explain_run(run).advice if advice.cause == "straggler"]
    assert f"Rank {SLOW} is slower than its peers at equal work" in advice.what
    assert advice.gain_s == about(DELAY_S)


def test_every_peer_waits_and_blames_the_one_rank(tmp_path: Path) -> None:
    patches = {"Passes": late_passes(SLOW, DELAY_S)}
    step = measured(traced(tmp_path, {"replica": 2, "shard": 2}, patches))
    for rank in (0, 2, 3):
        # Two of them never meet rank 1 in a collective: they wait for the one that waited for it.
        assert step.blame[rank].get(SLOW, 0.0) == about(DELAY_S)
        assert step.ranks[rank].straggler == pytest.approx(DELAY_S, abs=2 * BOUND_S)
    assert step.ranks[SLOW].host == pytest.approx(DELAY_S, abs=2 * BOUND_S)


def test_late_input_is_input_there_and_straggling_elsewhere(tmp_path: Path) -> None:
    step = measured(traced(tmp_path, {"shard": 2}, {"build_batches": late_batches(SLOW, DELAY_S)}))
    assert step.ranks[SLOW].input == about(DELAY_S)
    assert step.ranks[SLOW].host < DELAY_S and step.ranks[SLOW].straggler < BOUND_S
    assert step.ranks[1 - SLOW].input < BOUND_S
    assert step.ranks[1 - SLOW].straggler == about(DELAY_S)
    assert step.blame[1 - SLOW][SLOW] == about(DELAY_S)


def test_two_causes_at_once_are_told_apart(tmp_path: Path) -> None:
    patches = {
        "Passes": late_passes(1, DELAY_S),
        "squared_norm": late(0, 1.5 * DELAY_S, loop.squared_norm),
    }
    step = measured(traced(tmp_path, {"replica": 2}, patches))
    assert step.ranks[0].straggler == about(DELAY_S) and step.blame[0][1] == about(DELAY_S)
    assert step.ranks[1].straggler == about(1.5 * DELAY_S) and step.blame[1][0] == about(1.5 * DELAY_S)
    assert step.ranks[0].host - step.ranks[1].host == about(0.5 * DELAY_S)
    assert step.closes


def life_of(run: RunFolder) -> tuple[Explanation, dict[int, list[Span]]]:
    events = read_events(run, 0)
    return explain_run(run), {r: [line for line in lines if isinstance(line, Span)] for r, lines in events.items()}


@pytest.mark.parametrize(("name", "function"), [("evaluation", "evaluate"), ("checkpoint", "save")])
def test_what_happens_between_steps_is_not_in_them(tmp_path: Path, name: str, function: str) -> None:
    patches = {function: late(SLOW, DELAY_S, getattr(loop, function), first=0)}
    run = traced(tmp_path, {"shard": 2}, patches, checkpoint={"every_steps": 3}, evaluation={"every_steps": 3})
    told, spans = life_of(run)
    times = 3 if name == "evaluation" else 2
    for rank, own in spans.items():
        taken = [span.end_s - span.start_s for span in own if span.name == name]
        # The other rank waits for the late one where they meet: in there too, less what it is late itself.
        assert len(taken) == times and (rank != SLOW or all(seconds > DELAY_S - BOUND_S for seconds in taken))
    account = dict(told.life.account.rows())
    assert account[name] > 1.5 * times * (DELAY_S - BOUND_S)
    assert told.step is not None and told.step.wall_s < DELAY_S
    assert all(rank.straggler < BOUND_S for rank in told.step.ranks.values())


def test_useful_work_is_that_of_a_ranks_own_stages(tmp_path: Path) -> None:
    """Or a rank with few blocks would seem to compute in less time than its device can."""
    layout = {"pipeline": 2, "shard": 2, "stage_layers": [4, 1]}
    job = tiny_job(tmp_path, processes=4, model={"layers": 5, "vocabulary": 8}, layout=layout, data={"global_batch": 8})
    first, also_first, last, also_last = (useful_seconds(job, rank) for rank in range(4))
    assert first == also_first and last == also_last
    assert first > 3 * last
    peak = job.cluster.device.peak_flops_per_s(job.layout.precision)
    assert 2 * (first + last) * peak == pytest.approx(8 * count_flops(job.model, job.data.sequence).training())
