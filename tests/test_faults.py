"""Faults planted in the ranks of a layout: that `meshwright verify` catches them, and what it calls them."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from cases import DENSE_FAMILIES, Case, build_job
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from verifying import Fault, References, assert_agrees, no_fault, verdict_of

from meshwright.data import StepBatches
from meshwright.explain.verification import Cause, Verdict
from meshwright.parallel import tensor
from meshwright.parallel.reduce import local_gradients
from meshwright.spec import Job
from meshwright.train import loop, setup


def gradients_averaged(_job: Job) -> AbstractContextManager[object]:
    """Gradients are averaged over ranks, though the loss is divided by the whole global batch."""
    return mock.patch.multiple(
        FSDPModule,
        set_gradient_divide_factor=lambda *_: None,
        set_force_sum_reduction_for_comms=lambda *_: None,
    )


def gradients_summed_twice(job: Job) -> AbstractContextManager[object]:
    """Every gradient comes out as many times too large as there are ranks."""
    forward_backward = loop.forward_backward

    def multiplying(model: Any, *others: Any) -> Tensor:
        loss = forward_backward(model, *others)
        for gradient in local_gradients(model):
            gradient *= job.layout.data_size
        return loss

    return mock.patch.object(loop, "forward_backward", multiplying)


def own_norm_alone(_job: Job) -> AbstractContextManager[object]:
    """The norm is of each rank's own part of the gradient."""
    reduce_step = loop.reduce_step

    def reducing(loss: Tensor, squared: Tensor, *layout: Any, **more: Any) -> Any:
        totals = reduce_step(loss, squared, *layout, **more)
        totals.values[1] = squared
        return totals

    return mock.patch.object(loop, "reduce_step", reducing)


def same_samples(_job: Job) -> AbstractContextManager[object]:
    """Every rank takes the first share of the global batch."""
    return mock.patch.object(setup, "data_rank", return_value=0)


def not_a_number(_job: Job) -> AbstractContextManager[object]:
    """The logits that are trained on are nan."""
    forward = loop.Passes.forward
    return mock.patch.object(loop.Passes, "forward", lambda *arguments: forward(*arguments) * float("nan"))


def overflow(_job: Job) -> AbstractContextManager[object]:
    """What a row-split module sums is inf in one place."""
    give = tensor.give

    def giving(rule: Any, mesh: DeviceMesh, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor:
        given = give(rule, mesh, module, inputs, output)
        if rule == tensor.RULES["row"]:
            given = given.index_fill(2, torch.tensor(0), float("inf"))
        return given

    return mock.patch.object(tensor, "give", giving)


def after_backward(change: Callable[[nn.Module], None]) -> AbstractContextManager[object]:
    """Something is done to the gradients of every step."""
    forward_backward = loop.forward_backward

    def changing(model: nn.Module, *others: Any) -> Tensor:
        loss = forward_backward(model, *others)  # pyright: ignore[reportArgumentType]
        change(model)
        return loss

    return mock.patch.object(loop, "forward_backward", changing)


def gradient_left_out(_job: Job) -> AbstractContextManager[object]:
    """One parameter has no gradient."""

    def drop(model: nn.Module) -> None:
        model.get_parameter("blocks.0.attention_norm.weight").grad = None

    return after_backward(drop)


def gradients_halved(_job: Job) -> AbstractContextManager[object]:
    """All of them."""

    def halve(model: nn.Module) -> None:
        for gradient in local_gradients(model):
            gradient *= 0.5

    return after_backward(halve)


def one_gradient_halved(_job: Job) -> AbstractContextManager[object]:
    """A norm's, a hundredth of the whole gradient."""

    def halve(model: nn.Module) -> None:
        gradient = model.get_parameter("blocks.0.attention_norm.weight").grad
        assert gradient is not None
        gradient *= 0.5

    return after_backward(halve)


def partial_results(_job: Job) -> AbstractContextManager[object]:
    """A row-split module's partial results are cut along the sequence without being summed."""
    give = tensor.give

    def cutting(rule: Any, mesh: DeviceMesh, module: nn.Module, inputs: tuple[Any, ...], output: DTensor) -> Tensor:
        if rule != tensor.RULES["row"]:
            return give(rule, mesh, module, inputs, output)
        return output.to_local().chunk(mesh.size(), 1)[mesh.get_local_rank()]

    return mock.patch.object(tensor, "give", cutting)


def mean_of_each_microbatch(job: Job) -> AbstractContextManager[object]:
    """Each microbatch's loss is divided by what counts in one microbatch instead of in all of a step."""
    forward_backward = loop.forward_backward
    accumulation = job.layout.accumulation(job.data.global_batch)

    def dividing(model: Any, share: StepBatches, *others: Any) -> Tensor:
        return forward_backward(model, share._replace(counted=share.counted / accumulation), *others)

    return mock.patch.object(loop, "forward_backward", dividing)


Find = Callable[..., Verdict]


@pytest.fixture(scope="module")
def verdict(folder: Path, references: References) -> Find:
    """What verify says of a layout, right or with a fault in it."""

    def find(fault: Fault = no_fault, precision: str = "fp32", **settings: Any) -> Verdict:
        case = Case(**settings)
        run = {"name": f"{fault.__name__}-{precision}-{case}"}
        return verdict_of(build_job(folder, case, run=run, layout={"precision": precision}), references, fault)

    return find


@pytest.fixture(scope="module")
def cause_of(verdict: Find) -> Callable[..., Cause]:
    """What verify makes of a fault in a layout."""

    def find(fault: Fault, **settings: Any) -> Cause:
        found = verdict(fault, **settings)
        assert not found.agrees
        assert found.cause is not None
        return found.cause

    return find


@pytest.mark.parametrize("axes", [{"shard": 4}, {"replica": 2, "shard": 2}, {"replica": 2, "tensor": 2}], ids=str)
def test_gradients_scaled_by_the_number_of_ranks_are_named(cause_of: Callable[..., Cause], axes: Any) -> None:
    ranks = axes.get("replica", 1) * axes.get("shard", 1)
    for fault, factor, words in (
        (gradients_averaged, 1 / ranks, "averaged over them"),
        (gradients_summed_twice, ranks, "once too often"),
    ):
        cause = cause_of(fault, **axes)
        assert cause.factor == pytest.approx(factor, rel=1e-3)
        assert f"the {ranks} ranks of replica x shard" in cause.likely and words in cause.likely


@pytest.mark.parametrize("axes", [{"shard": 2}, {"tensor": 2}, {"shard": 2, "tensor": 2}], ids=str)
def test_a_norm_over_local_parts_is_named(cause_of: Callable[..., Cause], axes: Any) -> None:
    cause = cause_of(own_norm_alone, **axes)
    assert cause.module == "gradient norm"
    assert cause.factor is not None and cause.factor < 1
    assert "parts on other ranks are left out" in cause.likely


@pytest.mark.parametrize("axes", [{"replica": 2}, {"replica": 2, "shard": 2}, {"replica": 2, "tensor": 2}], ids=str)
def test_a_sample_on_two_replicas_is_named(cause_of: Callable[..., Cause], axes: Any) -> None:
    cause = cause_of(same_samples, **axes)
    # The first rank of the second share, and that share's first sample.
    rank = axes.get("tensor", 1)
    sample = 32 // (axes["replica"] * axes.get("shard", 1))
    assert cause.module == f"rank {rank}, sample {sample}"
    assert "different parts of the global batch" in cause.likely


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_a_missing_sum_behind_a_row_split_is_named(cause_of: Callable[..., Cause], family: str) -> None:
    cause = cause_of(partial_results, tensor=2, family=family)
    assert cause.module == "blocks.0.attention.output"
    assert "must be summed along tensor" in cause.likely


def test_a_missing_sum_is_not_taken_for_attentions_fault(cause_of: Callable[..., Cause]) -> None:
    """What attention mixes is compared on its own, so what comes behind it is not blamed on the keys that it sees."""
    cause = cause_of(partial_results, context=2, tensor=2)
    assert cause.module == "blocks.0.attention.output"
    assert "must be summed along tensor" in cause.likely


@pytest.mark.parametrize("axes", [{"replica": 2}, {"shard": 2, "zero": 1}, {"tensor": 2}], ids=str)
def test_an_unscaled_loss_under_accumulation_is_named(cause_of: Callable[..., Cause], axes: Any) -> None:
    cause = cause_of(mean_of_each_microbatch, accumulation=4, **axes)
    assert cause.module == "loss"
    assert cause.factor == pytest.approx(4, rel=1e-3)
    assert "the 4 microbatches of a step" in cause.likely


def test_what_is_not_a_number_is_named(cause_of: Callable[..., Cause]) -> None:
    """It goes through the ranks' files like any other number."""
    for fault, module in (
        (not_a_number, "loss"),
        (overflow, "blocks.0.attention.output"),
    ):
        cause = cause_of(fault, tensor=2)
        assert cause.module == module
        assert cause.factor is None
        assert "nan or inf" in cause.likely


def test_a_gradient_that_no_rank_has_is_named(verdict: Find) -> None:
    found = verdict(gradient_left_out, shard=2)
    assert found.cause is not None
    assert found.cause.module == "blocks.0.attention_norm.weight"
    assert "no gradient" in found.cause.likely
    row = next(row for row in found.rows if row.what == "gradients of step 1")
    assert not row.agrees and row.where == "blocks.0.attention_norm.weight not compared"


# --- A precision that rounds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"shard": 2, "accumulation": 4}, {"replica": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layouts_equal_one_process_in_bf16(verdict: Find, family: str, settings: Any) -> None:
    assert_agrees(verdict(precision="bf16", family=family, **settings))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_off_by_a_factor_are_named_in_bf16(cause_of: Callable[..., Cause], family: str) -> None:
    cause = cause_of(gradients_halved, precision="bf16", family=family, shard=2)
    assert cause.factor == pytest.approx(0.5, rel=0.03)
    assert "the 2 ranks of replica x shard: gradients are averaged" in cause.likely


def test_one_small_gradient_off_is_named_in_bf16(cause_of: Callable[..., Cause]) -> None:
    cause = cause_of(one_gradient_halved, precision="bf16", shard=2)
    assert cause.module == "blocks.0.attention_norm"
    assert cause.factor == pytest.approx(0.5, rel=0.03)


def test_what_is_not_a_number_is_named_in_bf16(cause_of: Callable[..., Cause]) -> None:
    cause = cause_of(not_a_number, precision="bf16", shard=2)
    assert cause.module == "loss" and "nan or inf" in cause.likely
