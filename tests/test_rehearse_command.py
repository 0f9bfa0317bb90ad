"""`meshwright rehearse`, and the plan with what it measured."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import commands
import msgspec
import pytest
import torch
from test_kineto import Trace, ms

from meshwright.account import MemoryAccount, StepAccount
from meshwright.launch.rehearsal import on_device
from meshwright.plan import build_plan, fullest_rank, library_bytes, predict, rank_memory, rank_step
from meshwright.plan.collective import build_shard_ring, predict_collective
from meshwright.plan.memory import NCCL_BYTES
from meshwright.plan.rates import rates_of
from meshwright.plan.rehearsal import build_paces, groups_of
from meshwright.record import Rehearsal
from meshwright.record.kineto import STAND_IN
from meshwright.record.rehearsal import seconds_at
from meshwright.spec import Job, SettingError
from meshwright.spec.decode import planning_job


def planned(*settings: str, model: str = "llama3-8b", gpus: str = "4x8xh100") -> Job:
    return planning_job(model=model, gpus=gpus, sequence=4096, global_batch=64, settings=settings)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="about GPUs")
PIPELINE = ("layout.pipeline=4", "layout.shard=8", "layout.recompute=full")


def a_rehearsal(job: Job, rank: int, *, times: float = 1.0, device: str = "h100") -> Rehearsal:
    """One in which all took `times` what was predicted."""
    step, memory = rank_step(job, rank), rank_memory(job, rank)
    measured = step.scaled(times)
    # Useful work is what it is.
    measured = msgspec.structs.replace(
        measured, useful=step.useful, inefficiency=measured.compute - step.useful - measured.contention
    )
    return Rehearsal(
        model=job.model,
        layout=job.layout,
        sequence=job.data.sequence,
        global_batch=job.data.global_batch,
        device=device,
        rank=rank,
        steps=8,
        step_s=measured.total(),
        predicted=step,
        predicted_memory=memory,
        measured=measured,
        overlapped={"shard": 0.1, "control": 0.0},
        memory=memory.scaled(times),
        asked=(),
    )


def rounded(account: StepAccount | MemoryAccount) -> dict[str, Any]:
    return {name: pytest.approx(value, rel=1e-9, abs=1e-12) for name, value in account.rows()}


@pytest.mark.parametrize("settings", [("layout.shard=32",), ("layout.shard=8", "layout.tensor=4"), PIPELINE])
def test_a_rehearsal_as_predicted_changes_nothing(settings: tuple[str, ...]) -> None:
    job = planned(*settings)
    for rank in (0, 31):
        own, plan = predict(job), build_plan(job, rehearsal=a_rehearsal(job, rank))
        assert dict(plan.job.step.rows()) == rounded(own.step)
        assert plan.job.memory.total() == pytest.approx(own.memory.total(), rel=0.02)
        assert plan.job.notes[0].startswith(f"rehearsed: rank {rank}'s compute and memory were measured on h100")


def test_the_mean_of_ranks_that_are_alike_is_what_is_predicted_for_one() -> None:
    job = planned("layout.shard=8", "layout.tensor=4")
    assert dict(rank_step(job, 5).rows()) == rounded(predict(job).step)


def test_what_a_rank_took_takes_the_place_of_what_was_predicted() -> None:
    job = planned("layout.shard=32")
    rehearsal = a_rehearsal(job, 3, times=1.5)
    own, plan = predict(job), build_plan(job, rehearsal=rehearsal)
    assert plan.job.step_s == pytest.approx(1.5 * own.step_s)
    assert plan.job.step.useful == own.step.useful
    assert plan.job.step.compute == pytest.approx(1.5 * own.step.compute)
    assert plan.job.memory == rehearsal.memory
    assert plan.job.overlapped == {"shard": 0.1}
    assert plan.job.step_interval_s[0] < plan.job.step_s < plan.job.step_interval_s[1]
    (listed,) = [p for p in plan.ranked if p.layout == job.layout] or [plan.job]
    assert listed.step_s == plan.job.step_s


def test_a_pipelines_other_ranks_are_as_much_slower_as_the_rehearsed_one() -> None:
    job = planned(*PIPELINE)
    own, plan = predict(job), build_plan(job, rehearsal=a_rehearsal(job, 0, times=2))
    kernels_s, planned_s = (step.compute - step.contention for step in (plan.job.step, own.step))
    assert kernels_s == pytest.approx(2 * planned_s)
    assert plan.job.step.bubble > 1.5 * own.step.bubble > 0
    # The last stage, with the logits, is the fullest, and not the one that was rehearsed.
    assert fullest_rank(job) == 24
    assert [memory.activations for memory in plan.memories] == [
        pytest.approx(2 * memory.activations) for memory in build_plan(job).memories
    ]
    assert plan.job.memory == max(plan.memories, key=MemoryAccount.total)
    # The rehearsed rank has no logits to tell of.
    assert plan.memories[-1].logits == own.memory.logits > 0


def test_the_slow_down_by_transfers_stays_where_they_moved_nothing() -> None:
    job = planned("layout.shard=32")
    rehearsal = a_rehearsal(job, 0)
    assert rehearsal.measured.contention > 0
    calm = msgspec.structs.replace(rehearsal.measured, contention=0.0)
    plan = build_plan(job, rehearsal=msgspec.structs.replace(rehearsal, measured=calm, step_s=calm.total()))
    assert plan.job.step_s == pytest.approx(predict(job).step_s)


def test_what_no_peak_is_known_of_is_known_once_rehearsed() -> None:
    job = planned("layout.shard=32")
    measured = a_rehearsal(job, 0)
    device = msgspec.structs.replace(job.cluster.device, peak_bf16_flops_per_s=0.0)
    unknown = msgspec.structs.replace(job, cluster=msgspec.structs.replace(job.cluster, device=device))
    assert predict(unknown).step_s == 0
    plan = build_plan(unknown, rehearsal=msgspec.structs.replace(measured, predicted=rank_step(unknown, 0)))
    assert plan.job.step_s == pytest.approx(measured.step_s)


def test_another_device_tells_memory_alone() -> None:
    job = planned("layout.shard=32")
    own, plan = predict(job), build_plan(job, rehearsal=a_rehearsal(job, 0, times=2, device="h200"))
    assert plan.job.step == own.step and plan.job.memory.total() == pytest.approx(2 * own.memory.total(), rel=0.01)
    assert "times are predictions" in plan.job.notes[0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("layout.zero=2", "layout (shard 32"),
        ("data.global_batch=128", "global_batch (64)"),
        ("model.layers=4", "model"),
    ],
)
def test_a_rehearsal_of_another_job_is_refused(change: str, named: str) -> None:
    rehearsal = a_rehearsal(planned("layout.shard=32"), 0)
    with pytest.raises(SettingError) as refused:
        build_plan(planned("layout.shard=32", change), rehearsal=rehearsal)
    assert named in str(refused.value) and "nearest that works" in str(refused.value)


def test_paces_are_the_plans_own() -> None:
    job = planned("layout.pipeline=2", "layout.replica=2", "layout.shard=4", "layout.tensor=2")
    found = {pace.ranks: pace.curves for pace in build_paces(job, 13)}
    groups = {tuple(sorted(group)) for group in groups_of(job.layout, 13) if len(group) > 1}
    assert groups <= set(found) and all(13 in ranks for ranks in found)
    shards = tuple(sorted(groups_of(job.layout, 13)[2]))
    assert len(shards) == 4
    ring, rates = build_shard_ring(job.layout, job.cluster), rates_of(job.cluster)
    for size_bytes in (0.0, 12.0, 1e5, 3e8):
        wanted = predict_collective("all_gather", size_bytes, ring, rates)
        assert seconds_at(found[shards]["all_gather"], size_bytes) == pytest.approx(wanted)
    assert set(found[13, 29]) >= {"send", "all_reduce"}


@pytest.mark.parametrize("rank", [0, 7, 100])
def test_every_group_of_a_rank_has_its_own_size(rank: int) -> None:
    settings = ("layout.pipeline=2", "layout.shard=16", "layout.context=2", "layout.tensor=2", "layout.expert=8")
    layout = planned(*settings, model="mixtral-8x7b", gpus="16x8xh100").layout
    sizes = [len(group) for group in groups_of(layout, rank)]
    assert sizes == [2, 1, 16, 2, 2, 32, 8, 8, 128]
    assert all(rank in group for group in groups_of(layout, rank))


def test_what_stands_in_for_a_transfer_on_a_gpu_counts_as_one() -> None:
    trace = Trace()
    trace.kernel("one", 12, 16, launch=10.5)
    trace.annotate(f"{STAND_IN}all_gather mesh_shard", 10.6, 10.8)
    trace.kernel("copy", 14, 15, launch=10.65)
    trace.kernel("spin_kernel(long)", 15, 18, launch=10.7)
    trace.kernel("two", 18, 20, launch=10.9)
    step = trace.measured()
    assert ms(step.account) == {"inefficiency": 6, "comm.shard": 2}
    assert step.overlapped == {"shard": pytest.approx(2e-3)}


def test_a_gpu_job_takes_the_device_that_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    job = planned("layout.shard=32")
    same = msgspec.structs.replace(job.cluster.device, memory_bytes=85e9)
    assert on_device(job, same) is job and not capsys.readouterr().err
    other = planned(gpus="1xh200").cluster.device
    assert on_device(job, other).cluster == msgspec.structs.replace(job.cluster, device=other)
    assert "this machine's GPU is another (h200) than the cluster's (h100)" in capsys.readouterr().err
    # What is not there in a rehearsal is added as predicted.
    assert library_bytes(job) == NCCL_BYTES and library_bytes(planned(gpus="1xh100")) == 0


@needs_gpu
@pytest.mark.parametrize("layout", ["shard", "tensor", "context", "pipeline", "replica"])
def test_a_rank_of_eight_gpus_on_one(tmp_path: Path, layout: str) -> None:
    big = {"layers": 8, "d_model": 512, "heads": 8, "feed_forward": 1536, "vocabulary": 4096}
    sizes = {"shard": 1, "precision": "bf16"} | {layout: 8}
    job = commands.write_job(tmp_path, model=big, data={"sequence": 1024, "global_batch": 16}, layout=sizes)
    job.write_text(job.read_text().replace("processes = 2", 'gpus = "8xh100"'))
    done = commands.run("rehearse", job, "--rank", 3, CUDA_VISIBLE_DEVICES="0")
    assert done.returncode == 0, done.stderr
    rehearsal = msgspec.json.decode((tmp_path / "runs" / "tiny-rank-3.json").read_bytes(), type=Rehearsal)
    for term in ("parameters", "gradients", "optimizer_states"):
        assert getattr(rehearsal.memory, term) == getattr(rehearsal.predicted_memory, term) > 0
    sent_s = sum(s for name, s in rehearsal.measured.rows() if name.startswith("comm."))
    asked_s = sum(one.seconds for one in rehearsal.asked)
    # Exposed or hidden, what was asked for took about as long as it was to: two at once are exposed once, and clocks
    # fall under load.
    assert 0.3 * asked_s < sent_s + sum(rehearsal.overlapped.values()) < 2 * asked_s + 1e-3
    assert rehearsal.measured.compute > 0 and rehearsal.measured.other < 0.1 * rehearsal.measured.total()


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return commands.write_job(tmp_path_factory.mktemp("job"))


def test_rehearse_and_plan_with_it(job: Path) -> None:
    done = commands.run("rehearse", job, "--rank", 1, "--steps", 5)
    assert done.returncode == 0, done.stderr
    assert "rehearsing rank 1 of 2, 5 steps" in done.stderr
    for words in ("parameters", "all gather", "comm.shard (exposed)", "steps that were not profiled", "--rehearsed"):
        assert words in done.stdout
    file = job.parent / "runs" / "tiny-rank-1.json"
    rehearsal = msgspec.json.decode(file.read_bytes(), type=Rehearsal)
    assert rehearsal.rank == 1 and rehearsal.memory.parameters == rehearsal.predicted_memory.parameters > 0
    assert rehearsal.measured.compute > 0 and rehearsal.step_s > 0

    plan = commands.run("plan", job, "--rehearsed", file, "--json")
    assert plan.returncode == 0, plan.stderr
    told = json.loads(plan.stdout)
    assert told["job"]["memory"] == json.loads(file.read_text())["memory"]
    assert told["job"]["step_s"] == pytest.approx(rehearsal.step_s)
    assert told["job"]["notes"][0].startswith("rehearsed: rank 1's")

    other = commands.run("plan", job, "--rehearsed", file, "--set", "layout.zero=2")
    assert other.returncode == 2 and "is of another layout" in other.stderr
    assert not list(job.parent.glob("meshwright-rehearse-*"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--rank", "2"], "nearest that works: --rank 1"),
        (["--rank", "-1"], "nearest that works: --rank 0"),
        (["--steps", "4"], "--steps 5"),
        (["--out", "."], "is a folder"),
        (["--set", "layout.async_tensor=true", "--set", "layout.tensor=2", "--set", "layout.shard=1"], "async_tensor"),
        (["--set", "model.d_model=65536", "--set", "model.layers=200"], "GB this machine has; nearest that works"),
    ],
)
def test_what_cannot_be_rehearsed_is_one_line(job: Path, arguments: list[str], named: str) -> None:
    told = commands.run("rehearse", job, *arguments)
    assert told.returncode == 2 and told.stdout == ""
    assert named in told.stderr and told.stderr.count("\n") == 1


def test_a_cluster_of_gpus_needs_one(tmp_path: Path) -> None:
    job = commands.write_job(tmp_path, ranks=2)
    job.write_text(job.read_text().replace("processes = 2", 'gpus = "8xh100"').replace('"all"', "8"))
    told = commands.run("rehearse", job, "--set", "data.global_batch=8")
    assert told.returncode == 2 and "this machine has none; nearest that works" in told.stderr


@pytest.mark.parametrize("text", ["", "{}", "[1"])
def test_a_file_that_is_no_rehearsal(job: Path, tmp_path: Path, text: str) -> None:
    file = tmp_path / "rehearsal.json"
    for reason in ("cannot be read", "holds no rehearsal"):
        told = commands.run("plan", job, "--rehearsed", file)
        assert told.returncode == 2 and reason in told.stderr and told.stderr.count("\n") == 1
        file.write_text(text)


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    job = commands.write_job(tmp_path)
    with commands.running("rehearse", job, "--steps", 5000, TMPDIR=str(tmp_path)) as process:
        commands.wait_until(lambda: any(tmp_path.glob("meshwright-rehearse-*/rank/attempts/*/events/rank-*")), process)
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=commands.TIMEOUT_S)
    assert process.returncode == 130
    assert err.endswith("\nstopped; nothing was measured\n")
    commands.nothing_left(tmp_path)
    assert not list(tmp_path.glob("meshwright-rehearse-*"))
