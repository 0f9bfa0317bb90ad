"""`meshwright verify`: what it catches and what it calls it, what it makes of a job, and the command itself."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import commands
import msgspec
import pytest
import torch
from jobs import cpu_cluster, tiny_job
from test_equivalence import Case, build_job
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from verifying import Fault, References, assert_agrees, no_fault, verdict_of

from meshwright.data import StepBatches
from meshwright.explain.verification import Cause, Verdict, explain_trial
from meshwright.launch import run_trials
from meshwright.launch.shrink import LARGEST_WORLD, shrink_job, write_text
from meshwright.parallel import tensor
from meshwright.parallel.reduce import local_gradients
from meshwright.record.verification import Comparison, RankReport, Reference, Trial
from meshwright.report.verification import verification_json
from meshwright.spec import BUILT_FAMILIES, ZOO, Job, SettingError
from meshwright.spec.decode import planning_job
from meshwright.train import loop, setup

# --- Faults, each planted in the ranks of a layout that is right without it -----------------------------------------


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

    def reducing(loss: Tensor, squared: Tensor, *layout: Any, stop: bool) -> Any:
        totals = reduce_step(loss, squared, *layout, stop=stop)
        totals.values[1] = squared
        return totals

    return mock.patch.object(loop, "reduce_step", reducing)


def same_samples(_job: Job) -> AbstractContextManager[object]:
    """Every rank takes the first share of the global batch."""
    return mock.patch.object(setup, "data_rank", return_value=0)


def not_a_number(_job: Job) -> AbstractContextManager[object]:
    """The logits that are trained on are nan."""
    logits_of = loop.logits_of
    return mock.patch.object(loop, "logits_of", lambda *arguments: logits_of(*arguments) * float("nan"))


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
# What a rank compares tensor by tensor.
KINDS = ("outputs", "gradients", "weights")


@pytest.fixture(scope="module")
def verdict(tmp_path_factory: pytest.TempPathFactory) -> Find:
    """What verify says of a layout, right or with a fault in it."""
    folder = tmp_path_factory.mktemp("faults")
    write_text(folder)
    references = References(folder)
    choices = {"replica": 1, "shard": 1, "tensor": 1, "zero": 3, "accumulation": 1, "recompute": "none"}

    def find(fault: Fault = no_fault, precision: str = "fp32", **settings: Any) -> Verdict:
        case = Case(**{**choices, "family": "llama", **settings})
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


@pytest.mark.parametrize("family", BUILT_FAMILIES)
def test_a_missing_sum_behind_a_row_split_is_named(cause_of: Callable[..., Cause], family: str) -> None:
    cause = cause_of(partial_results, tensor=2, family=family)
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


def agreeing(folder: Path) -> Trial:
    """A trial of two ranks that compared half of each tensor."""
    half = Comparison(reference=1.0, ours=1.0, product=1.0, elements=2)
    kinds: dict[str, Any] = {kind: {"a": half, "b": half} for kind in KINDS}
    whole: dict[str, Any] = {kind: {"a": 4, "b": 4} for kind in KINDS}
    ranks = [RankReport(rank=rank, foreign=-1, losses=[1.0], norms=[1.0], **kinds) for rank in range(2)]
    reference = Reference(losses=[1.0], norms=[1.0], rounding=None, **whole)
    return Trial(job=tiny_job(folder), bound=1e-5, reference=reference, ranks=ranks)


@pytest.mark.parametrize("kind", KINDS)
def test_what_only_some_ranks_compared_is_named(tmp_path: Path, kind: str) -> None:
    """Whether a rank says nothing of a tensor or all have less than the whole."""
    trial = agreeing(tmp_path)
    assert explain_trial(trial).agrees
    half = trial.ranks[0].outputs["a"]
    for left in ({"a": half}, {"a": half, "b": msgspec.structs.replace(half, elements=1)}, {}):
        ranks = [trial.ranks[0], msgspec.structs.replace(trial.ranks[1], **{kind: left})]
        found = explain_trial(msgspec.structs.replace(trial, ranks=ranks))
        assert not found.agrees
        row = next(row for row in found.rows if row.what.startswith(kind))
        assert row.where == ("b not compared" if left else "a not compared")


def test_trials_of_two_precisions_are_one_json(tmp_path: Path) -> None:
    trial = agreeing(tmp_path)
    broken = msgspec.structs.replace(trial.ranks[1], losses=[float("nan")])
    trials = [trial, msgspec.structs.replace(trial, ranks=[trial.ranks[0], broken])]
    found = json.loads(verification_json([(trial, explain_trial(trial)) for trial in trials]))
    assert [entry["verdict"]["cause"] is None for entry in found] == [True, False]
    assert found[1]["trial"]["ranks"][1]["losses"] == [None]


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


# --- What a job is made into ----------------------------------------------------------------------------------------


def planned(name: str, gpus: str, layout: dict[str, Any]) -> Job:
    """A job that nobody here could run."""
    settings = [f"layout.{key}={value}" for key, value in layout.items()]
    return planning_job(model=name, gpus=gpus, sequence=1024, global_batch=512, settings=settings)


def same_kind(job: Job, small: Job) -> None:
    """Fail where the small job splits in another way than the job."""
    axes = ("replica", "shard", "tensor")
    assert [small.layout.size(axis) > 1 for axis in axes] == [job.layout.size(axis) > 1 for axis in axes]
    assert small.layout.world_size <= LARGEST_WORLD
    assert small.layout.zero == job.layout.zero
    assert small.layout.recompute == job.layout.recompute
    assert (small.layout.accumulation(small.data.global_batch) > 1) == (
        job.layout.accumulation(job.data.global_batch) > 1
    )
    assert small.model.family == job.model.family
    assert small.model.tied_embeddings == job.model.tied_embeddings
    assert (small.model.attention_window > 0) == (job.model.attention_window > 0)
    assert (small.model.rope_scaling is None) == (job.model.rope_scaling is None)
    assert (small.model.kv_heads < small.model.heads) == (job.model.kv_heads < job.model.heads)
    assert (small.model.kv_heads < small.layout.tensor) == (job.model.kv_heads < job.layout.tensor)


def test_the_largest_model_on_its_cluster_is_made_small(tmp_path: Path) -> None:
    for recompute in ("none", "selective", "full"):
        layout = {"replica": 2, "shard": 32, "tensor": 8, "zero": 2, "recompute": recompute}
        job = planned("llama3.1-405b", "64x8xh100", layout)
        small = shrink_job(job, tmp_path, local=cpu_cluster)
        same_kind(job, small)
        assert small.model.d_model < 300 and small.model.layers == 2


@pytest.mark.parametrize("name", [name for name, row in ZOO.items() if row.spec.family in BUILT_FAMILIES])
@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
def test_each_model_of_the_zoo_is_made_small(tmp_path: Path, name: str, tensor: int) -> None:
    if ZOO[name].spec.heads % tensor or ZOO[name].spec.feed_forward % tensor:
        with pytest.raises(SettingError, match="does not divide model"):
            planned(name, "2x8xh100", {"shard": 16 // tensor, "tensor": tensor})
        return
    job = planned(name, "2x8xh100", {"shard": 16 // tensor, "tensor": tensor, "recompute": "selective"})
    same_kind(job, shrink_job(job, tmp_path, local=cpu_cluster))


def splits() -> Iterator[tuple[int, int, int]]:
    """Every tensor size, key heads and query heads that a layout may have, up to 16 of each."""
    for size, kv_heads, group in product(range(1, 17), range(1, 17), (1, 2, 3, 7)):
        if not kv_heads * group % size and not (kv_heads % size and size % kv_heads):
            yield size, kv_heads, kv_heads * group


def test_every_split_of_heads_is_made_small(tmp_path: Path) -> None:
    """Also where half of a size divides nothing that the size did."""
    for size, kv_heads, heads in splits():
        job = tiny_job(
            tmp_path,
            processes=2 * size,
            model={"d_model": 8 * heads, "heads": heads, "kv_heads": kv_heads, "head_dim": 8, "feed_forward": 4 * size},
            data={"sequence": 8 * size},
            layout={"shard": 2, "tensor": size},
        )
        same_kind(job, shrink_job(job, tmp_path, local=cpu_cluster))


def test_a_model_that_can_only_be_planned_is_refused_as_it_is() -> None:
    job = planned("deepseek-v3", "1x8xh100", {"shard": 8})
    with pytest.raises(SettingError, match=r'model.family = "deepseek-v3": can be planned'):
        run_trials(job, local=cpu_cluster)


# --- The command ----------------------------------------------------------------------------------------------------


def test_a_job_that_is_right_is_said_to_be(tmp_path: Path) -> None:
    told = commands.run("verify", commands.write_job(tmp_path), TMPDIR=str(tmp_path))
    assert told.returncode == 0, told.stderr
    assert "shard 2" in told.stdout
    for what in ("samples", "outputs of step 1", "loss", "gradients of step 1", "weights after step 5", "blocks.0"):
        assert what in told.stdout
    assert "The layout equals one process" in told.stdout
    assert not list(tmp_path.glob("meshwright-verify-*"))


def test_what_was_compared_is_json_too(tmp_path: Path) -> None:
    told = commands.run("verify", "--json", commands.write_job(tmp_path), "--set", "layout.zero=2")
    assert told.returncode == 0, told.stderr
    (found,) = json.loads(told.stdout)
    assert found["trial"]["job"]["layout"]["zero"] == 2
    assert len(found["trial"]["ranks"]) == 2
    assert found["verdict"]["cause"] is None
    assert all(row["difference"] <= row["bound"] for row in found["verdict"]["rows"])


@pytest.mark.parametrize("setting", ["layout.shard=3", "layout.recompute=2", "run.stepz=1"])
def test_a_bad_setting_is_one_line(tmp_path: Path, setting: str) -> None:
    told = commands.run("verify", commands.write_job(tmp_path), "--set", setting)
    assert told.returncode == 2
    assert told.stdout == ""
    assert setting.partition("=")[0] in told.stderr and "nearest that works" in told.stderr
    assert told.stderr.count("\n") == 1


@pytest.mark.parametrize("training", [False, True])
def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, training: bool) -> None:
    """While the job's process starts, and while its ranks train."""
    job = commands.write_job(tmp_path)
    with commands.running("verify", job, TMPDIR=str(tmp_path)) as process:
        pattern = "meshwright-verify-*/layout/" + ("attempts/*/events/rank-*" if training else "job.json")
        commands.wait_until(lambda: any(tmp_path.glob("meshwright-verify-*/layout*")), process)
        if training:
            commands.wait_until(lambda: any(tmp_path.glob(pattern)), process)
        os.kill(process.pid, signal.SIGINT)
        process.communicate(timeout=commands.TIMEOUT_S)
    assert process.returncode == 130
    commands.nothing_left(tmp_path)
    assert not list(tmp_path.glob("meshwright-verify-*"))
