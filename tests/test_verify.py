"""`meshwright verify`: what it makes of a job, what it makes of what ranks compared, and the command itself."""

import io
import json
import os
import signal
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import commands
import msgspec
import pytest
from jobs import cpu_cluster, tiny_job
from rich.console import Console

from meshwright.explain.verification import explain_trial
from meshwright.launch import run_trials
from meshwright.launch.shrink import LARGEST_WORLD, find_unverified, shrink_job
from meshwright.record.verification import Comparison, RankReport, Reference, Trial
from meshwright.report.verification import verification_json, verification_text
from meshwright.spec import BUILT_FAMILIES, ZOO, Job, SettingError
from meshwright.spec.decode import planning_job

# What a rank compares tensor by tensor.
KINDS = ("outputs", "gradients", "weights")


# --- What ranks compared --------------------------------------------------------------------------------------------


def agreeing(folder: Path) -> Trial:
    """A trial of two ranks that compared half of each tensor."""
    half = Comparison(reference=1.0, ours=1.0, product=1.0, elements=2)
    kinds: dict[str, Any] = {kind: {"a": half, "b": half} for kind in KINDS}
    whole: dict[str, Any] = {kind: {"a": 4, "b": 4} for kind in KINDS}
    ranks = [RankReport(rank=rank, foreign=-1, losses=[1.0], norms=[1.0], **kinds) for rank in range(2)]
    reference = Reference(losses=[1.0], norms=[1.0], counted=1, rounding=None, **whole)
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
    assert (small.layout.expert > 1) == (job.layout.expert > 1)
    assert (small.layout.expert_shard > 1) == (job.layout.expert_shard > 1)
    if job.model.experts is not None:
        assert small.model.experts is not None
        assert (small.model.experts.shared > 0) == (job.model.experts.shared > 0)
        assert (small.model.experts.dense_layers > 0) == (job.model.experts.dense_layers > 0)
        assert small.model.experts.per_token < small.model.experts.count
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
    spec = ZOO[name].spec
    if spec.heads % tensor or spec.feed_forward % tensor:
        with pytest.raises(SettingError, match="does not divide model"):
            planned(name, "2x8xh100", {"shard": 16 // tensor, "tensor": tensor})
        return
    job = planned(name, "2x8xh100", {"shard": 16 // tensor, "tensor": tensor, "recompute": "selective"})
    same_kind(job, shrink_job(job, tmp_path, local=cpu_cluster))
    for expert in (2, 8, 16) if spec.experts is not None else ():
        layout = {"shard": 16 // tensor, "tensor": tensor, "expert": expert}
        if spec.experts is not None and spec.experts.count % expert == 0:
            job = planned(name, "2x8xh100", layout)
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


@pytest.mark.parametrize(
    ("offload", "gpus", "kept", "said"),
    [
        ("none", True, "none", ()),
        ("parameters", True, "parameters", ()),
        ("optimizer", True, "none", ("means nothing to SGD",)),
        ("parameters", False, "none", ("needs GPUs",)),
        ("optimizer", False, "none", ("means nothing to SGD",)),
    ],
)
def test_what_of_offloading_can_be_verified_is_and_what_cannot_is_told(
    tmp_path: Path, offload: str, gpus: bool, kept: str, said: tuple[str, ...]
) -> None:
    job = planned("llama3-8b", "1x8xh100", {"shard": 8, "offload": offload})
    small = shrink_job(job, tmp_path, local=lambda _: job.cluster if gpus else cpu_cluster(8))
    same_kind(job, small)
    assert small.layout.offload == kept
    told = find_unverified(job, small)
    assert len(told) == len(said)
    assert all(f'layout.offload = "{offload}"' in line and why in line for line, why in zip(told, said, strict=True))


def test_what_is_not_verified_stands_under_the_heading(tmp_path: Path) -> None:
    job = planned("llama3-8b", "1x8xh100", {"shard": 4, "tensor": 2, "async_tensor": "true"})
    told = find_unverified(job, shrink_job(job, tmp_path, local=cpu_cluster))
    trial = msgspec.structs.replace(agreeing(tmp_path), unverified=told)
    drawn = Console(record=True, width=120, file=io.StringIO())
    verification_text(trial, explain_trial(trial), drawn)
    assert drawn.export_text().splitlines()[1] == "Not verified: layout.async_tensor = true: it needs GPUs"


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
    assert told.stdout.startswith(
        "The job, shrunk to: shard 2, zero 3, microbatch 1, fp32, against one process (llama,"
    )
    assert told.stderr.startswith("verifying in fp32: one process, then 2 ranks;")
    assert "The layout equals one process" in told.stdout
    assert not list(tmp_path.glob("meshwright-verify-*"))


@pytest.mark.slow
def test_what_was_compared_is_json_too(tmp_path: Path) -> None:
    told = commands.run("verify", "--json", commands.write_job(tmp_path), "--set", "layout.zero=2")
    assert told.returncode == 0, told.stderr
    (found,) = json.loads(told.stdout)
    assert found["trial"]["job"]["layout"]["zero"] == 2
    assert len(found["trial"]["ranks"]) == 2
    assert found["verdict"]["cause"] is None
    assert all(row["difference"] <= row["bound"] for row in found["verdict"]["rows"])


@pytest.mark.parametrize(
    ("setting", "named"),
    [("layout.shard=3", "layout of 3 ranks"), ("layout.recompute=2", "layout.recompute"), ("run.stepz=1", "run.stepz")],
)
def test_a_bad_setting_is_one_line(tmp_path: Path, setting: str, named: str) -> None:
    told = commands.run("verify", commands.write_job(tmp_path), "--set", setting)
    assert told.returncode == 2
    assert told.stdout == ""
    assert named in told.stderr and "nearest that works" in told.stderr
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
