"""`meshwright verify`: what it catches and what it calls it, what it makes of a job, and the command itself."""

import json
import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import commands
import pytest
from jobs import cpu_cluster
from test_equivalence import Case, build_job
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from verifying import Fault, References, verdict_of

from meshwright.data import StepBatches
from meshwright.explain.verification import Cause
from meshwright.launch.shrink import LARGEST_WORLD, shrink_job, write_text
from meshwright.parallel import tensor
from meshwright.parallel.reduce import local_gradients
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


@pytest.fixture(scope="module")
def cause_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Cause]:
    """What verify makes of a fault in a layout."""
    folder = tmp_path_factory.mktemp("faults")
    write_text(folder)
    references = References(folder)

    def find(fault: Fault, **settings: Any) -> Cause:
        choices: dict[str, Any] = {
            "replica": 1,
            "shard": 1,
            "tensor": 1,
            "zero": 3,
            "accumulation": 1,
            "recompute": "none",
        }
        case = Case(**{**choices, "family": "llama", **settings})
        job = build_job(folder, case, run={"name": f"{fault.__name__}-{case}"})
        verdict = verdict_of(job, references, fault)
        assert not verdict.agrees
        assert verdict.cause is not None
        return verdict.cause

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


# --- The command ----------------------------------------------------------------------------------------------------


def test_a_job_that_is_right_is_said_to_be(tmp_path: Path) -> None:
    told = commands.run("verify", commands.write_job(tmp_path), TMPDIR=str(tmp_path))
    assert told.returncode == 0, told.stderr
    assert "shard 2" in told.stdout
    for what in ("samples", "outputs of step 1", "loss", "gradients of step 1", "weights after step 5", "blocks.0"):
        assert what in told.stdout
    assert told.stdout.startswith(
        "The job, shrunk to: shard 2, zero 3, microbatch 1, fp32, against one process (llama,"
    )
    assert told.stderr.startswith("verifying in fp32: one process, then 2 ranks;")
    assert "The layout equals one process" in told.stdout
    assert not list(tmp_path.glob("meshwright-verify-*"))


def test_what_was_compared_is_json_too(tmp_path: Path) -> None:
    told = commands.run("verify", "--json", commands.write_job(tmp_path), "--set", "layout.zero=2")
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout)
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
        _, err = process.communicate(timeout=commands.TIMEOUT_S)
    assert process.returncode == 130
    assert err.endswith("\nstopped; nothing was compared\n")
    commands.nothing_left(tmp_path)
    assert not list(tmp_path.glob("meshwright-verify-*"))
