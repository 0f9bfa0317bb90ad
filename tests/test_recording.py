"""A program that is not ours records itself, by three lines in its loop, and the record is whole and true."""

import gc
import os
import re
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from loops import ROWS, WIDTH, Read, batches, build, step_flops, update
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, schedule

from meshwright.explain import explain_run
from meshwright.record import Ended, Memory, Span, Step
from meshwright.spec import SettingError
from meshwright.trace import record, samples


def split_data(model: nn.Sequential) -> nn.Module:
    return DistributedDataParallel(model)


def split_parameters(model: nn.Sequential) -> nn.Module:
    for block in model:
        fully_shard(block)
    fully_shard(model)
    return model


def split_matrices(model: nn.Sequential) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for block in model:
        parallelize_module(block, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return model


def train(run: Path, split: Callable[[nn.Sequential], nn.Module], steps: int, workers: int = 0, **options: Any) -> None:
    """A rank's loop, in a process group where there are ranks."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    model = split(build())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    recorder = record(run, model, optimizer, **options)
    for batch in recorder.steps(batches(steps, workers)):
        recorder.log(loss=update(model, optimizer, batch))
    with recorder.span("checkpoint"):
        pass
    recorder.close()
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "split", [split_data, split_parameters, split_matrices], ids=["data", "parameters", "matrices"]
)
def test_two_ranks_record_one_run(tmp_path: Path, split: Callable[[nn.Sequential], nn.Module]) -> None:
    run_ranks(2, train, tmp_path / "run", split, 12, 1)
    run = Read(tmp_path / "run")
    whole = sum(p.numel() for p in build().parameters())
    assert set(run.ranks) == {0, 1} and run.faults() == []
    assert run.program.world_size == 2 and run.program.precision == "fp32"
    assert run.program.parameters == whole
    share = 2 if split is split_matrices else 1
    assert run.program.flops_per_step == step_flops() / share
    assert not run.program.recompute
    assert [line.step for line in run.metrics] == list(range(12))
    assert all(line.loss is not None and line.step_s > 0 for line in run.metrics)
    for rank in run.ranks:
        steps = run.spans("step", rank)
        assert sum(span.count for span in steps) == 12 and steps[-1].step == 11
        assert len(run.spans("startup", rank)) == len(run.spans("checkpoint", rank)) == 1
        # Around the step whose FLOPs are counted, and the one that is sampled.
        assert len(run.spans("measurement", rank)) >= 4
        assert [line.measured.step for line in run.of(Step, rank)] == [samples.FIRST_SAMPLE]
        assert [line.how for line in run.of(Ended, rank)] == ["finished"]
        (memory,) = run.of(Memory, rank)
        held = memory.account.parameters
        assert held == memory.account.gradients == memory.account.optimizer_states
        # Biases of what is multiplied row by row are whole on each.
        assert held == 4 * whole if split is split_data else 4 * whole / 2 <= held < 4 * whole
    carried: dict[Any, str] = {split_data: "replica", split_parameters: "shard", split_matrices: "tensor"}
    explained(run, carried[split])
    spans = sorted((s for s in run.of(Span) if s.name != "measurement"), key=lambda s: s.start_s)
    assert all(a.end_s <= b.start_s + 1e-6 for a, b in pairwise(spans))


@pytest.mark.parametrize("flat", [False, True], ids=["stages", "flattened"])
def test_parts_of_one_model_add_up(tmp_path: Path, flat: bool) -> None:
    """Stages of a pipeline, which hold different parameters; FSDP1 flattens and cuts them, so that none can be told."""
    run_ranks(2, train_flattened if flat else train_stages, tmp_path / "run")
    run = Read(tmp_path / "run")
    assert set(run.ranks) == {0, 1} and run.faults() == [] and len(run.metrics) == 12
    whole = sum(p.numel() for p in build().parameters())
    assert run.program.parameters == (None if flat else whole)
    if not flat:
        # The first stage's first product needs no gradient of its input: the mean of both ranks is half of the whole.
        assert run.program.flops_per_step == step_flops() / 2
    purpose = "shard" if flat else "pipeline"
    for rank in run.ranks:
        (step,) = run.of(Step, rank)
        assert purpose in {transfer.purpose for transfer in step.measured.transfers}
    explained(run, purpose)


def explained(run: Read, purpose: str) -> None:
    """The record is enough to explain the run by."""
    found = explain_run(run.folder)
    assert found.step is not None and found.step.closes and found.life.account.total() > 0
    sent = {group.purpose for group in found.detail.groups} if found.detail else set()
    assert purpose in sent


def train_stages(run: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    # By the names that its parameters have in the whole model.
    stage = nn.Sequential(OrderedDict({str(rank): build()[rank]}))
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
    parts = PipelineStage(stage, rank, 2, torch.device("cpu"))
    schedule = Schedule1F1B(parts, 2, loss_fn=lambda made, _: made.square().mean())
    recorder = record(run, stage, optimizer)
    for batch in recorder.steps(batches(12)):
        schedule.step(*([batch] if rank == 0 else []), **({"target": batch} if rank else {}))
        optimizer.step()
        optimizer.zero_grad()
    recorder.close()
    dist.destroy_process_group()


def train_flattened(run: Path) -> None:
    train(run, lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")), 12)


def test_all_ranks_sample_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which rank 0 decides by what they cost, and tells in time."""
    for name in ("SHORTEST_S", "NOTICE_S"):
        monkeypatch.setattr(samples, name, 1.5)
    run_ranks(2, train_a_while, tmp_path / "run")
    run = Read(tmp_path / "run")
    first, second = ([line.measured.step for line in run.of(Step, rank)] for rank in (0, 1))
    assert len(first) >= 2 and first == second and run.faults() == []


def train_a_while(run: Path) -> None:
    dist.init_process_group("gloo")
    model = DistributedDataParallel(build())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with record(run, model, optimizer, budget=0.5) as recorder:
        for _ in range(120):
            loss = update(model, optimizer, torch.ones(ROWS, WIDTH))
            time.sleep(0.05)
            recorder.next_step(loss=loss)
        # Or rank 0, which has the store, leaves while the other still reads its last sample.
        dist.barrier()
    dist.destroy_process_group()


def record_alone(run: Path, **options: Any) -> Any:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, record(run, model, optimizer, **options)


def test_microbatches_make_a_step(tmp_path: Path) -> None:
    model, optimizer, recorder = record_alone(tmp_path / "run", tokens_per_step=100)
    for batch in recorder.steps(batches(10), microbatches=3):
        model(batch).sum().backward()
    for batch in recorder.steps(batches(3)):
        update(model, optimizer, batch)
    recorder.close("stopped")
    run = Read(tmp_path / "run")
    # What is left at a loader's end is a step too.
    assert [line.step for line in run.metrics] == list(range(4 + 3))
    assert all(line.tokens_per_s == pytest.approx(100 / line.step_s) for line in run.metrics)
    assert run.program.flops_per_step is not None and run.program.flops_per_step > step_flops()
    assert [line.how for line in run.of(Ended)] == ["stopped"]


def test_what_stands_outside_is_in_no_step(tmp_path: Path) -> None:
    model, optimizer, recorder = record_alone(tmp_path / "run")
    with recorder.span("evaluation"):
        time.sleep(0.3)
    for step in range(4):
        update(model, optimizer, torch.ones(ROWS, WIDTH))
        if step == 1:
            with recorder.span("checkpoint"):
                time.sleep(0.3)
        recorder.next_step()
    recorder.close()
    run = Read(tmp_path / "run")
    outside = [*run.spans("evaluation"), *run.spans("checkpoint")]
    assert len(outside) == 2 and all(span.end_s - span.start_s >= 0.3 for span in outside)
    assert len(run.metrics) == 4
    apart = sum(line.step_s for line in run.metrics) + sum(span.end_s - span.start_s for span in outside)
    spans = run.of(Span)
    assert apart <= max(span.end_s for span in spans) - min(span.start_s for span in spans)
    for step in run.spans("step"):
        assert all(step.end_s <= span.start_s or span.end_s <= step.start_s for span in outside)
    # Its FLOPs are not counted while half of it is left: another step's are.
    assert run.program.flops_per_step == step_flops()


CRASH = """
import sys, torch
from loops import batches, build, update
from meshwright.trace import record
model = build()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
recorder = record(sys.argv[1], model, optimizer)
for step, batch in enumerate(recorder.steps(batches(50, workers=1))):
    update(model, optimizer, batch)
    if step == 20 and sys.argv[2] == "raise":
        raise ValueError("mine")
"""


@pytest.mark.parametrize("ending", ["raise", "forget"])
def test_a_crash_loses_the_last_line_alone(tmp_path: Path, ending: str) -> None:
    command = [sys.executable, "-c", CRASH, str(tmp_path / "run"), ending]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    finished = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert finished.returncode == (1 if ending == "raise" else 0), finished.stderr
    assert finished.stderr.rstrip().endswith("ValueError: mine" if ending == "raise" else "")
    run = Read(tmp_path / "run")
    steps = 20 if ending == "raise" else 50
    assert sum(span.count for span in run.spans("step")) == len(run.metrics) == steps
    assert len(run.of(Step)) == 1 and run.of(Ended) == [] and run.faults() == []


def test_the_programs_own_profiler_goes_first(tmp_path: Path) -> None:
    model, optimizer, recorder = record_alone(tmp_path / "run", every_steps=1)
    products: list[int] = []

    def count(theirs: profile) -> None:
        products.append(sum(event.name == "aten::addmm" for event in theirs.events() or ()))

    plan = schedule(wait=8, warmup=1, active=2, repeat=1)
    with profile(activities=[ProfilerActivity.CPU], schedule=plan, on_trace_ready=count) as theirs:
        for batch in recorder.steps(batches(20)):
            update(model, optimizer, batch)
            theirs.step()
    recorder.close()
    run = Read(tmp_path / "run")
    # Two products forward in each block, in both steps: what is ours has left their trace alone.
    assert products == [2 * 4]
    sampled = [line.measured.step for line in run.of(Step)]
    assert any(step < 8 for step in sampled) and any(step > 12 for step in sampled)
    assert not {9, 10} & set(sampled)
    assert any("own profiler" in fault for fault in run.faults())


def test_samples_at_a_set_distance_are_all_taken_and_let_go_of(tmp_path: Path) -> None:
    """However long it takes to read them; also where garbage is never collected."""
    gc.collect()
    gc.disable()
    try:
        model, optimizer, recorder = record_alone(tmp_path / "run", every_steps=4)
        for batch in recorder.steps(batches(30)):
            update(model, optimizer, batch)
        recorder.close()
        held = [one for one in gc.get_objects() if type(one) is torch.autograd.profiler.profile]
    finally:
        gc.enable()
    run = Read(tmp_path / "run")
    # The first would stand right behind the step whose FLOPs are counted.
    assert sorted(line.measured.step for line in run.of(Step)) == [3, *range(6, 30, 4)] and run.faults() == []
    assert held == []


def test_a_word_that_cannot_be_kept_is_a_fault_and_no_more(tmp_path: Path) -> None:
    model, optimizer, recorder = record_alone(tmp_path / "run")
    for batch in recorder.steps(batches(10)):
        update(model, optimizer, batch)
        recorder.log(loss=torch.ones(3), learning_rate=0.5)
    recorder.close()
    run = Read(tmp_path / "run")
    assert len(run.metrics) == 10 and all("was not recorded" in fault for fault in run.faults())


def test_a_second_start_is_another_attempt(tmp_path: Path) -> None:
    for first in (0, 5):
        model, optimizer, recorder = record_alone(tmp_path / "run", first_step=first)
        for batch in recorder.steps(batches(8)):
            update(model, optimizer, batch)
        recorder.close()
    run = Read(tmp_path / "run", attempt=1)
    assert run.folder.attempt_numbers() == [0, 1]
    assert [(line.step, line.attempt) for line in run.metrics] == [
        *((step, 0) for step in range(5)),
        *((step, 1) for step in range(5, 13)),
    ]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"groups": {"mine": "tensr"}}, r"""groups\['mine'\] = 'tensr': is no purpose; .* "tensor\""""),
        ({"budget": 0.0}, r"budget=0.0: .*; nearest that works: budget=0.005, or every_steps=0 for no samples"),
        ({"budget": 0.1, "every_steps": 3}, "budget: cannot stand beside every_steps"),
        ({"every_steps": 2.5}, "every_steps=2.5: must be a whole number"),
        ({"flops_per_step": -1}, "flops_per_step=-1: must be a number above 0"),
        ({"precision": "fp8"}, "precision='fp8': is no precision"),
    ],
)
def test_what_cannot_be_honoured_is_refused(tmp_path: Path, options: dict[str, Any], line: str) -> None:
    with pytest.raises(SettingError) as refused:
        record_alone(tmp_path / "run", **options)
    assert re.search(line, str(refused.value)) and not (tmp_path / "run").exists()


def test_other_things_than_models_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"record\(model\): is a int, not a torch Module"):
        record(tmp_path / "run", 3)  # pyright: ignore[reportArgumentType]
    (tmp_path / "job.toml").write_text("")
    with pytest.raises(SettingError, match="holds a run of meshwright train"):
        record(tmp_path)
    with pytest.raises(SettingError, match="cannot be made"):
        record(tmp_path / "job.toml" / "run")


def test_ranks_must_have_met(tmp_path: Path) -> None:
    assert "before init_process_group" in run_ranks(2, meet_late, tmp_path / "run")[0]
    # What rank 0 is refused, all are.
    assert all("is a file" in line for line in run_ranks(2, meet_at_a_file, tmp_path / "file"))


def meet_late(run: Path) -> str:
    with pytest.raises(SettingError) as refused:
        record(run)
    return str(refused.value)


def meet_at_a_file(run: Path) -> str:
    run.write_text("")
    dist.init_process_group("gloo")
    return meet_late(run)
