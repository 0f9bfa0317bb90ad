"""Mixtures of experts: layouts against one process, what a run keeps and tells of them, and what is refused.

Which experts a token goes to is a jump, not a slope: where two of them stand equal, round-off decides, and a layout
could differ from one process without being wrong. So the inputs here keep the last that is chosen clear of the first
that is not, in every token of every step, and a test holds them to it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from jobs import tiny_job
from mixtures import SEEDS, mixture_job
from ranks import run_ranks
from torch import Tensor
from training import assert_same_training, new_run, train_in_turns, train_layout, train_rank, weights
from verifying import Fault, References, verdict_of

from meshwright.explain.verification import Cause
from meshwright.models import Experts
from meshwright.models.experts import Choice, keep_best_groups
from meshwright.parallel import expert
from meshwright.record import Step, read_events
from meshwright.spec import Job, SettingError
from meshwright.train import loop
from meshwright.train.progress import describe
from meshwright.verify.alone import train_alone

# Of the scores that a router ranks, relative: a thousand times what fp32 rounds.
LEAST_MARGIN = 1e-4


# --- Choices that no round-off turns ----------------------------------------------------------------------------------


def margin(ranked: Tensor, chosen: int) -> float:
    """How far the last of `chosen` is from the first that is not, relative, at the least over all tokens."""
    last, beaten = ranked.topk(chosen + 1, dim=-1).values[..., -2:].unbind(-1)
    return float(((last - beaten) / last.abs()).min())


def margins_of(job: Job, written: Path) -> list[float]:
    """The relative distance of each pass's closest call, in one process's training."""
    seen: list[float] = []
    choose = Experts.choose

    def choosing(self: Experts, logits: Tensor, bias: Tensor | None) -> Choice:
        choice = choose(self, logits, bias)
        scores = (logits.sigmoid() if self.sigmoid else logits.softmax(-1)).detach()
        ranked = scores if bias is None else scores + bias
        if self.settings.groups > 1:
            groups, kept = self.settings.groups, self.settings.groups_per_token
            seen.append(margin(ranked.unflatten(-1, (groups, -1)).topk(2, dim=-1).values.sum(-1), kept))
            ranked = keep_best_groups(ranked, groups, kept)
        seen.append(margin(ranked, self.settings.per_token))
        return choice

    with mock.patch.object(Experts, "choose", choosing):
        train_alone(job, torch.device("cpu"), written)
    return seen


@pytest.mark.parametrize(("mixture", "layers"), SEEDS)
def test_no_choice_is_close(folder: Path, mixture: str, layers: int) -> None:
    job = mixture_job(folder, mixture, model={"layers": layers})
    margins = margins_of(job, folder / "margins.safetensors")
    assert len(margins) > job.run.steps
    assert min(margins) > LEAST_MARGIN


# --- Faults ---------------------------------------------------------------------------------------------------------


def weights_not_differentiated(_job: Job) -> AbstractContextManager[object]:
    """Routers decide, and are never told how well."""
    choose = Experts.choose

    def choosing(self: Experts, *arguments: Any) -> Choice:
        choice = choose(self, *arguments)
        return choice._replace(weights=choice.weights.detach())

    return mock.patch.object(Experts, "choose", choosing)


def token_dropped(_job: Job) -> AbstractContextManager[object]:
    """A rank's last row to another rank comes back as nothing."""
    back = expert.AllToAll._send_back

    def dropping(self: expert.AllToAll, *arguments: Any) -> Tensor:
        rows = back(self, *arguments)
        kept = torch.ones(len(rows), 1)
        kept[-1] = 0
        return rows * kept

    return mock.patch.object(expert.AllToAll, "_send_back", dropping)


def experts_averaged(_job: Job) -> AbstractContextManager[object]:
    """The reduction of the experts' own gradients is left as FSDP has it, a mean."""
    return mock.patch.object(expert, "sum_gradients")


def balance_of_each_rank(_job: Job) -> AbstractContextManager[object]:
    """Biases follow what a rank's own tokens did."""
    reduce_step = loop.reduce_step

    def reducing(*arguments: Any, loads: Tensor, **more: Any) -> Any:
        own = loads.clone()
        return reduce_step(*arguments, loads=loads, **more)._replace(loads=own)

    return mock.patch.object(loop, "reduce_step", reducing)


@pytest.fixture
def cause_of(folder: Path, references: References, tmp_path: Path) -> Callable[..., Cause]:
    """What verify makes of a fault in a layout of a mixture."""

    def find(fault: Fault, mixture: str, **layout: int) -> Cause:
        job = mixture_job(folder, mixture, layout=layout, run={"folder": str(tmp_path)})
        verdict = verdict_of(job, references, fault)
        assert not verdict.agrees
        assert verdict.cause is not None
        return verdict.cause

    return find


@pytest.mark.parametrize("axes", [{"shard": 2}, {"tensor": 2, "expert": 2}], ids=str)
def test_weights_that_are_not_differentiated_are_named(cause_of: Callable[..., Cause], axes: Any) -> None:
    cause = cause_of(weights_not_differentiated, "mixtral", **axes)
    assert cause.module == "blocks.1.feed_forward.router"
    assert "differentiated" in cause.likely


@pytest.mark.parametrize("axes", [{"shard": 2, "expert": 2}, {"shard": 2, "tensor": 2, "expert": 4}], ids=str)
def test_a_dropped_token_is_named(cause_of: Callable[..., Cause], axes: Any) -> None:
    cause = cause_of(token_dropped, "mixtral", **axes)
    assert cause.module == "blocks.0.feed_forward.experts"
    assert "dropped" in cause.likely


@pytest.mark.parametrize("axes", [{"shard": 4}, {"shard": 4, "expert": 2}], ids=str)
def test_experts_gradients_averaged_over_their_own_ranks_are_named(cause_of: Callable[..., Cause], axes: Any) -> None:
    ranks = axes["shard"] // axes.get("expert", 1)
    cause = cause_of(experts_averaged, "mixtral", **axes)
    assert cause.module.endswith("feed_forward.experts")
    assert cause.factor == pytest.approx(1 / ranks, rel=1e-3)
    assert f"the {ranks} ranks that hold parts or copies of the same experts: gradients are averaged" in cause.likely


def test_biases_moved_by_one_ranks_tokens_are_named(cause_of: Callable[..., Cause]) -> None:
    cause = cause_of(balance_of_each_rank, "mixtral", shard=2)
    assert cause.module == "blocks.0.feed_forward.router"
    assert "moved by other counts than the whole global batch's" in cause.likely


# --- What a run keeps and tells -------------------------------------------------------------------------------------


def test_another_layout_of_the_experts_goes_on_where_the_first_stopped(folder: Path, tmp_path: Path) -> None:
    """Weights, moments and biases, saved by one layout and read by others."""

    def adam_job(name: str, layout: dict[str, int]) -> Job:
        return mixture_job(
            folder,
            "shared",
            accumulation=2,
            layout=layout,
            run={"folder": str(tmp_path), "name": name},
            optimizer={"name": "adamw", "learning_rate": 0.01},
            checkpoint={"every_steps": 1, "keep": 0},
        )

    layouts = ({"shard": 2, "expert": 2}, {"pipeline": 2, "tensor": 2}, {"shard": 4, "expert": 2})
    turns = [(adam_job("parted", layout), until) for layout, until in zip(layouts, (1, 3, 5), strict=True)]
    parted, whole = train_in_turns(turns), train_in_turns([(adam_job("whole", layouts[0]), 5)])
    assert_same_training(turns[0][0], parted, whole)
    again = weights(turns[0][0], parted)
    assert any(name.endswith("router.bias") and tensor.any() for name, tensor in again.items())


def test_load_and_balance_are_told(folder: Path, tmp_path: Path) -> None:
    job = mixture_job(
        folder, "mixtral", layout={"shard": 2, "expert": 2}, run={"folder": str(tmp_path), "name": "told"}
    )
    lines, _, _ = train_layout(job)
    for line in lines:
        assert line.expert_load is not None and 1 <= line.expert_load <= 8 / 2
        assert line.balance_loss is not None and line.balance_loss >= 2 * 0.3 * 0.9
    assert "fullest expert" in describe(lines[-1])


def test_a_profiled_step_says_what_each_ranks_experts_were_sent(folder: Path, tmp_path: Path) -> None:
    """The rows of all ranks are the tokens' choices, computed again or not; their transfers are the expert axis's."""
    job = mixture_job(
        folder,
        "mixtral",
        accumulation=2,
        layout={"shard": 2, "tensor": 2, "expert": 2, "recompute": "full"},
        run={"folder": str(tmp_path), "name": "traced"},
        trace={"every_steps": 2},
    )
    run, attempt = new_run(job)
    run_ranks(4, train_rank, job, run, attempt)
    steps = {
        rank: [e.measured for e in events if isinstance(e, Step)] for rank, events in read_events(run, attempt).items()
    }
    profiled = [measured[0] for measured in steps.values()]
    assert len(profiled) == 4
    for measured in profiled:
        assert len(measured.expert_rows) == 2 * 2
        assert 0 < measured.expert_share < 0.5
        ranks = {transfer.ranks for transfer in measured.transfers if transfer.purpose == "expert"}
        assert ranks == {(0, 1)} if measured.rank < 2 else {(2, 3)}
    rows = [sum(passes) for passes in zip(*(measured.expert_rows for measured in profiled), strict=True)]
    assert rows == [4 * 16 * 2] * 4


# --- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "experts", "names", "reason", "nearest"),
    [
        ({"shard": 4, "expert": 3}, {"count": 6}, "layout.expert = 3", "context x tensor = 4, which", "expert = 2"),
        ({"shard": 4, "expert": 4}, {"count": 6}, "layout.expert = 4", "model.experts.count = 6", "expert = 2"),
        ({"shard": 4}, {"feed_forward": 6}, "layout.expert = 1", "leaves 4 ranks", "layout.expert = 2"),
        ({"shard": 4}, {"feed_forward": 6, "count": 5}, "layout.expert = 1", "nor model.d_model = 34", "fewer ranks"),
        ({}, {"per_token": 9}, "model.experts.per_token = 9", "between 1 and 8", "per_token = 8"),
        ({}, {"groups": 3}, "model.experts.groups = 3", "does not divide model.experts.count = 8", "groups = 2"),
        ({}, {"groups": 4, "per_token": 3}, "model.experts.per_token = 3", "more than the 2 experts", "per_token = 2"),
        ({}, {"dense_layers": 2}, "model.experts.dense_layers = 2", "between 0 and 1", "dense_layers = 1"),
        ({}, {"bias_rate": -1.0}, "model.experts.bias_rate = -1.0", "between 0.0 and 1.0", "bias_rate = 0.0"),
        ({}, {"balance_loss": -1.0}, "model.experts.balance_loss = -1.0", "between", "balance_loss = 0.0"),
    ],
)
def test_what_cannot_be_divided_or_routed_is_one_line(
    tmp_path: Path, layout: dict[str, int], experts: dict[str, Any], names: str, reason: str, nearest: str
) -> None:
    numbers = {"count": 8, "per_token": 2, "feed_forward": 24} | experts
    with pytest.raises(SettingError) as refused:
        mixture_job(tmp_path, "mixtral", layout=layout, model={"experts": numbers, "d_model": 34})
    error = refused.value
    assert names in error.setting and reason in error.reason and nearest in error.nearest


@pytest.mark.parametrize("setting", [{"balance_loss": 0.1}, {"bias_rate": 0.1}])
def test_balance_means_nothing_without_experts(tmp_path: Path, setting: dict[str, float]) -> None:
    with pytest.raises(SettingError, match=r"model\.experts: means nothing to llama"):
        tiny_job(tmp_path, model={"experts": {"count": 4, "per_token": 1, "feed_forward": 8} | setting})
