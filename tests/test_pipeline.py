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
from training import assert_same_training, new_run, train_in_turns, train_rank
from verifying import Fault, References, assert_agrees, verdict_of

from meshwright.data import StepBatches
from meshwright.explain.verification import explain_trial
from meshwright.parallel import pipeline
from meshwright.parallel.later import Product
from meshwright.parallel.reduce import local_gradients
from meshwright.record import RunFolder
from meshwright.record.verification import Comparison, RankReport, Reference, Trial
from meshwright.spec import Action, Direction, Job
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


def test_a_checkpoint_goes_on_in_other_pipelines_and_without_one(folder: Path, tmp_path: Path) -> None:
    """Two copies of a tied embedding with their moments, in one stage's rank and in two; held-out losses on the way."""

    def adam_job(name: str, layout: dict[str, Any]) -> Job:
        return pipelined(
            folder,
            tmp_path,
            {"pipeline": 1, **layout},
            run={"name": name, "folder": str(tmp_path)},
            model={"layers": 5, "vocabulary": 263, "tied_embeddings": True},
            data={"attention": "document", "held_out": 0.1, "global_batch": 8},
            optimizer={"name": "adamw", "learning_rate": 0.01},
            checkpoint={"every_steps": 1, "keep": 0},
            evaluation={"every_steps": 1, "sequences": 4},
        )

    layouts = ({"pipeline": 2, "schedule": "zbv"}, {"pipeline": 2, "schedule": "interleaved"}, {"shard": 2})
    turns = [(adam_job("parts", layout), until) for layout, until in zip(layouts, (2, 3, 5), strict=True)]
    whole = adam_job("whole", {})
    assert_same_training(whole, train_in_turns(turns), train_in_turns([(whole, 5)]))


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


def gradient_messages_doubled(_job: Job) -> AbstractContextManager[object]:
    """What a stage is told of its output's gradient is twice what it should be."""
    take = pipeline.Mail.take

    def doubling(self: pipeline.Mail, direction: Direction, action: Action) -> Tensor:
        return take(self, direction, action) * (1.0 if direction == "forward" else 2.0)

    return mock.patch.object(pipeline.Mail, "take", doubling)


def products_of_one_microbatch(times: int) -> Fault:
    """What its backward passes put off is done so many times."""
    backward = pipeline.Passes.backward

    def repeating(self: pipeline.Passes, action: Action) -> None:
        if action.kind == "W" and action.microbatch == 3:
            self._put_off[action.stage, action.microbatch] *= times
        backward(self, action)

    return lambda _job: mock.patch.object(pipeline.Passes, "backward", repeating)


def tied_not_summed(_job: Job) -> AbstractContextManager[object]:
    """Each copy of a tied embedding keeps the gradient that its own stage gave it."""
    return mock.patch.object(pipeline, "sum_tied", return_value=None)


@pytest.mark.parametrize(
    ("fault", "settings", "module", "words"),
    [
        (scaled(1 / 8, by_tokens=False), {}, "head", "the 8 microbatches of a step: gradients are averaged"),
        (scaled(1.0, by_tokens=True), {}, "head", "tokens that count in a step: what is divided by them is divided"),
        (loss_of_each_microbatch, {}, "loss", "the 8 microbatches of a step: each one's loss"),
        (norm_without(0), {}, "gradient norm", "leaves out stage 0"),
        (norm_without(1), {}, "gradient norm", "leaves out stage 1"),
        (gradient_messages_doubled, {}, "blocks.3.feed_forward.down", "what stage 1 passes back to stage 0 is"),
        (
            gradient_messages_doubled,
            {"schedule": "interleaved", "tied": True},
            "blocks.6.feed_forward.down",
            "what stage 3 passes back to stage 2 is",
        ),
        (products_of_one_microbatch(0), {"schedule": "zero-bubble"}, "head", "lacks about one of the 8 microbatches"),
        (products_of_one_microbatch(2), {"schedule": "zbv"}, "head", "has about one too many of the 8 microbatches"),
        (tied_not_summed, {"tied": True}, "embedding", "the two copies are not both given the sum"),
    ],
    ids=[
        "averaged",
        "divided-by-tokens",
        "loss-times-microbatches",
        "no-first-stage",
        "no-last-stage",
        "messages-doubled",
        "messages-doubled-and-again",
        "weights-left-out",
        "weights-twice",
        "tied-not-summed",
    ],
)
def test_faults_of_pipelines_are_named(
    folder: Path,
    tmp_path: Path,
    references: References,
    fault: Fault,
    settings: dict[str, Any],
    module: str,
    words: str,
) -> None:
    tied = settings.get("tied", False)
    layout = {"pipeline": 2, **{name: value for name, value in settings.items() if name != "tied"}}
    job = pipelined(folder, tmp_path, layout, model={"tied_embeddings": tied})
    verdict = verdict_of(job, references, fault)
    assert not verdict.agrees and verdict.cause is not None
    assert verdict.cause.module == module
    assert words in verdict.cause.likely


def trial_of_norm(job: Job, parts: dict[str, float], copies: dict[str, int], norm: float) -> Trial:
    """A trial in which all agrees but the norm; parts: of the squared gradient. copies: ranks that hold one."""
    whole = Comparison(reference=1.0, ours=1.0, product=1.0, elements=1)
    gradients: dict[str, Comparison] = {}
    for name, part in parts.items():
        seen = copies.get(name, 1)
        gradients[name] = Comparison(reference=seen * part, ours=seen * part, product=seen * part, elements=seen)
    told: dict[str, Any] = {"outputs": {"a": whole}, "gradients": gradients, "weights": {"a": whole}}
    reports = [RankReport(rank=0, foreign=-1, losses=[1.0], norms=[norm], **told)] * job.layout.world_size
    elements: dict[str, Any] = {kind: dict.fromkeys(names, 1) for kind, names in told.items()}
    reference = Reference(losses=[1.0], norms=[1.0], counted=7, rounding=None, **elements)
    return Trial(job=job, bound=1e-5, reference=reference, ranks=reports)


@pytest.mark.parametrize(
    ("lacking", "named"),
    [
        (0.400, "leaves out stage 0"),
        (0.396, "leaves out stage 1"),
        (0.200, "leaves out stage 2"),
        (0.004, ""),
        (-0.1, ""),
    ],
)
def test_the_stage_that_a_norm_leaves_out_is_the_nearest(tmp_path: Path, lacking: float, named: str) -> None:
    """Not the first that is near; and none where what is missing, or too much, is no stage's part."""
    layout = {"pipeline": 4, "stage_layers": [2, 2, 2, 3]}
    job = pipelined(tmp_path, tmp_path, layout, model={"tied_embeddings": True})
    middle = {f"blocks.{2 * stage}.attention.query.weight": part for stage, part in ((1, 0.396), (2, 0.2), (3, 0.004))}
    trial = trial_of_norm(job, {"embedding.weight": 0.4} | middle, {"embedding.weight": 2}, (1 - lacking) ** 0.5)
    cause = explain_trial(trial).cause
    assert cause is not None and cause.module == "gradient norm"
    assert ("leaves out stage" in cause.likely) == bool(named) and named in cause.likely
