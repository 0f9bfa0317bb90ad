"""The measured account of a pipeline: what ranks wait for in turn, and for a rank that is late."""

from pathlib import Path

import pytest
from test_trace import closing, late_passes, measured, traced

from meshwright.account import CLOSING_TOLERANCE

# Microbatches of a pipeline's step: enough that most of it is not bubble.
MICROBATCHES = 4
# Of each forward pass of a slow stage; together far more than a step of the model takes.
DELAY_S = 0.3


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_a_pipelines_account_closes_and_knows_its_bubble(tmp_path: Path, schedule: str) -> None:
    model = {"d_model": 128, "feed_forward": 256, "layers": 4}
    data = {"global_batch": 2 * MICROBATCHES, "sequence": 256}
    _, step = closing(tmp_path, {"pipeline": 2, "schedule": schedule}, data=data, model=model)
    assert step.closes and step.poor_share < CLOSING_TOLERANCE
    for account in step.ranks.values():
        assert account.total() == pytest.approx(step.wall_s, rel=0.2)
        rows = dict(account.rows())
        assert rows["useful"] > 0 and rows["optimizer"] > 0 and rows["comm.pipeline"] >= 0
        assert 0 < rows["bubble"] < 0.5 * step.wall_s
        assert rows["imbalance"] >= 0 and rows["straggler"] >= 0


@pytest.mark.parametrize("late", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_slow_stage_is_found(tmp_path: Path, late: int) -> None:
    """What its neighbour waits for it is no bubble: the schedule explains only as much as equal ranks would wait."""
    patches = {"Passes": late_passes(late, DELAY_S)}
    data = {"global_batch": 2 * MICROBATCHES, "sequence": 64}
    step = measured(traced(tmp_path, {"pipeline": 2}, patches, data=data))
    other, slow = step.ranks[1 - late], step.ranks[late]
    late_s = MICROBATCHES * DELAY_S
    # Ranks share two cores with whatever else runs here, so sizes are loose.
    assert slow.host - other.host > 0.5 * late_s
    assert other.straggler > 0.5 * late_s > 2 * slow.straggler
    assert other.bubble < 0.1 * late_s
    assert step.blame == {late: {}, 1 - late: {late: pytest.approx(other.straggler)}}
