"""The pipeline axis: every schedule, alone and with other axes, equals one process; what planted faults look like."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from jobs import tiny_job
from ranks import run_ranks
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from training import new_run, train_rank
from verifying import Fault, References, assert_agrees, verdict_of

from meshwright.data import StepBatches
from meshwright.parallel.later import Product
from meshwright.parallel.reduce import local_gradients
from meshwright.record import RunFolder
from meshwright.spec import Job
from meshwright.train import loop


def pipelined(folder: Path, runs: Path, layout: dict[str, Any], **sections: dict[str, Any]) -> Job:
    """A job with more microbatches than stages, and layers that no number of stages divides."""
    data = layout.get("replica", 1) * layout.get("shard", 1)
    world = data * layout["pipeline"] * layout.get("tensor", 1)
    table: dict[str, dict[str, Any]] = {
        "run": {"folder": str(runs)},
        "model": {"layers": 9, "vocabulary": 263},
        "data": {"global_batch": 8 * data},
        "layout": {"microbatch": 1, **layout},
    }
    for name, section in sections.items():
        table[name] = table.get(name, {}) | section
    return tiny_job(folder, processes=world, **table)


@pytest.mark.parametrize(
    "layout",
    [
        {"pipeline": 2, "schedule": "interleaved", "stages_per_rank": 3},
        {"pipeline": 3, "stage_layers": [1, 2, 6]},
        {"pipeline": 2, "shard": 2, "order": ["replica", "shard", "context", "tensor", "pipeline"]},
    ],
    ids=["three-stages-a-rank", "stages-of-my-own", "order"],
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_pipeline_equals_one_process(
    folder: Path, tmp_path: Path, references: References, layout: dict[str, Any], tied: bool
) -> None:
    job = pipelined(folder, tmp_path, layout, model={"tied_embeddings": tied})
    assert_agrees(verdict_of(job, references))


@pytest.mark.parametrize("others", [{}, {"tensor": 2}], ids=["alone", "tensor"])
def test_products_put_off_are_added_up_in_fp32(folder: Path, tmp_path: Path, others: dict[str, int]) -> None:
    """As few microbatches as there can be: a stage's products are all left when its last backward pass has ended."""
    layout = {"pipeline": 2, "schedule": "zero-bubble", "precision": "bf16", **others}
    job = pipelined(folder, tmp_path, layout, data={"global_batch": 2}, run={"steps": 2})
    run, attempt = new_run(job)
    assert {seen for rank in run_ranks(job.layout.world_size, summed_in, job, run, attempt) for seen in rank} == {
        (torch.bfloat16, torch.float32)
    }


def summed_in(job: Job, run: RunFolder, attempt: int) -> set[tuple[torch.dtype, torch.dtype]]:
    """What a rank multiplies in, and what the results are added up in."""
    seen: set[tuple[torch.dtype, torch.dtype]] = set()
    add = Product.add

    def adding(product: Product) -> None:
        add(product)
        assert product.weight.grad is not None
        seen.add((product.x.dtype, product.weight.grad.dtype))

    with mock.patch.object(Product, "add", adding):
        train_rank(job, run, attempt)
    return seen


@pytest.mark.parametrize("zero", [1, 3])
def test_a_stage_gathers_no_more_than_its_passes_need(folder: Path, tmp_path: Path, zero: int) -> None:
    """A later stage's first block does not have the last microbatch's end gathered again."""
    layout = {"pipeline": 3, "shard": 2, "stage_layers": [1, 2, 1], "zero": zero}
    job = pipelined(folder, tmp_path, layout, model={"layers": 4}, data={"global_batch": 6}, run={"steps": 1})
    gathered = run_ranks(job.layout.world_size, gathers_of_a_step, job, *new_run(job))
    # Forward and backward of three microbatches, or once a step; the head is kept from one to the other.
    blocks, ends = (6, 3) if zero == 3 else (1, 1)
    assert gathered[2:] == [2 * blocks] * 2 + [blocks + ends] * 2


def gathers_of_a_step(job: Job, run: RunFolder, attempt: int) -> int:
    """Groups of parameters that a rank gathers in the passes of a step."""
    calls: list[int] = []
    forward_backward, gather = loop.forward_backward, _fsdp_param_group.foreach_all_gather

    def gathering(*arguments: Any) -> Any:
        calls.append(1)
        return gather(*arguments)

    def counting(*arguments: Any) -> Tensor:
        with mock.patch.object(_fsdp_param_group, "foreach_all_gather", gathering):
            return forward_backward(*arguments)

    train_rank(job, run, attempt, {"forward_backward": counting})
    return len(calls)


# --- Faults ---------------------------------------------------------------------------------------------------------


def scaled(factor: float, *, by_tokens: bool) -> Fault:
    """Gradients are scaled after the passes, and the loss is not: by a factor, or by it and the tokens that count."""
    forward_backward = loop.forward_backward

    def scaling(model: Any, share: StepBatches, *others: Any) -> Tensor:
        loss = forward_backward(model, share, *others)
        for gradient in local_gradients(model):
            gradient *= factor / share.counted if by_tokens else factor
        return loss

    return lambda _job: mock.patch.object(loop, "forward_backward", scaling)


def loss_of_each_microbatch(job: Job) -> AbstractContextManager[object]:
    """Each microbatch's loss counts as if it were the whole step's."""
    forward_backward = loop.forward_backward
    accumulation = job.layout.accumulation(job.data.global_batch)

    def multiplying(model: Any, share: StepBatches, *others: Any) -> Tensor:
        return forward_backward(model, share._replace(counted=share.counted / accumulation), *others)

    return mock.patch.object(loop, "forward_backward", multiplying)


def norm_without(stage: int) -> Fault:
    """The ranks of one stage put nothing into the norm."""
    squared_norm = loop.squared_norm

    def leaving_out(model: Any, **options: Any) -> Tensor:
        return squared_norm(model, **options) * (stage not in model.parts)

    return lambda _job: mock.patch.object(loop, "squared_norm", leaving_out)


@pytest.mark.parametrize(
    ("fault", "module", "words"),
    [
        (scaled(1 / 8, by_tokens=False), "head", "the 8 microbatches of a step: gradients are averaged"),
        (scaled(1.0, by_tokens=True), "head", "tokens that count in a step: what is divided by them is divided once"),
        (loss_of_each_microbatch, "loss", "the 8 microbatches of a step: each one's loss"),
        (norm_without(0), "gradient norm", "leaves out stage 0"),
        (norm_without(1), "gradient norm", "leaves out stage 1"),
    ],
    ids=[
        "averaged",
        "divided-by-tokens",
        "loss-times-microbatches",
        "no-first-stage",
        "no-last-stage",
    ],
)
def test_faults_of_pipelines_are_named(
    folder: Path, tmp_path: Path, references: References, fault: Fault, module: str, words: str
) -> None:
    verdict = verdict_of(pipelined(folder, tmp_path, {"pipeline": 2}), references, fault)
    assert not verdict.agrees and verdict.cause is not None
    assert verdict.cause.module == module
    assert words in verdict.cause.likely
