"""Trainers of others record themselves by a callback, or as any loop does, and the record is whole."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from loops import ROWS, WIDTH, Read, batches, build, step_flops, update
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils.data import Dataset

from meshwright.explain import explain_run
from meshwright.record import Ended, Memory, Step
from meshwright.trace import record


class Vectors(Dataset[dict[str, Tensor]]):
    """Samples in the form that a Hugging Face model takes."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.full((WIDTH,), index / self.count), "labels": torch.zeros(())}


class Scored(nn.Module):
    """A model that returns its loss, as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        del labels
        score = self.inner(x).square().mean()
        return {"loss": score, "score": score.detach().reshape(1)}


def whole(run: Read, steps: int, *, ranks: int = 1) -> None:
    """What every trainer's record holds."""
    assert run.faults() == [] and set(run.ranks) == set(range(ranks))
    assert [line.step for line in run.metrics] == list(range(steps))
    for rank in run.ranks:
        # A step within which the trainer evaluates has two spans.
        spans = run.spans("step", rank)
        told = [number for span in spans for number in range(span.step - span.count + 1, span.step + 1)]
        assert set(range(steps)) <= set(told) <= set(range(steps + 1)) and told == sorted(told)
        assert len(run.of(Step, rank)) == len(run.of(Memory, rank)) == 1
        assert [line.how for line in run.of(Ended, rank)] == ["finished"]
    assert run.program.parameters == sum(p.numel() for p in build().parameters())
    found = explain_run(run.folder)
    assert found.step is not None and found.step.closes


def train_by_huggingface(run: Path, scratch: Path) -> None:
    warnings.simplefilter("default")
    from transformers import Trainer, TrainingArguments

    from meshwright.trace.huggingface import RecordCallback

    arguments = TrainingArguments(
        output_dir=str(scratch),
        use_cpu=True,
        max_steps=12,
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=2,
        logging_steps=4,
        eval_strategy="steps",
        eval_steps=6,
        save_steps=10,
        report_to=[],
        disable_tqdm=True,
    )
    Trainer(
        model=Scored(),
        args=arguments,
        train_dataset=Vectors(12 * 2 * ROWS * 2),
        eval_dataset=Vectors(2 * ROWS),
        callbacks=[RecordCallback(run)],
    ).train()
    dist.destroy_process_group()


def test_hugging_faces_trainer_records_itself_by_its_callback(tmp_path: Path) -> None:
    run_ranks(2, train_by_huggingface, tmp_path / "run", tmp_path / "trainer")
    run = Read(tmp_path / "run")
    whole(run, 12, ranks=2)
    assert run.program.trainer.startswith("Hugging Face Trainer, transformers 5")
    # Two microbatches; a rank's own.
    assert run.program.flops_per_step == 2 * step_flops()
    for rank in run.ranks:
        assert len(run.spans("evaluation", rank)) == 2
        # The one that was asked for, and the one at the end.
        assert len(run.spans("checkpoint", rank)) == 2
    # What the trainer logs, and no loss that it did not say.
    assert [line.step for line in run.metrics if line.loss is not None] == [3, 7, 11]
    assert all(line.gradient_norm for line in run.metrics if line.loss is not None)


def train_by_accelerate(run: Path) -> None:
    warnings.simplefilter("default")
    from accelerate import Accelerator

    accelerator: Any = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model, optimizer, loader = accelerator.prepare(model, optimizer, batches(2 * 2 * 12))
    recorder = record(run, model, optimizer, trainer="accelerate")
    for batch in recorder.steps(loader, microbatches=2):
        with accelerator.accumulate(model):
            loss = model(batch).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        recorder.log(loss=loss)
    recorder.close()
    accelerator.end_training()


def test_an_accelerate_loop_records_itself_as_any_loop(tmp_path: Path) -> None:
    run_ranks(2, train_by_accelerate, tmp_path / "run")
    run = Read(tmp_path / "run")
    whole(run, 12, ranks=2)
    assert run.program.flops_per_step == 2 * step_flops()
    assert "accelerate" in run.program.versions and all(line.loss is not None for line in run.metrics)
    steps = [line.measured for rank in run.ranks for line in run.of(Step, rank)]
    assert all({transfer.purpose for transfer in step.transfers} == {"replica"} for step in steps)


def train_by_lightning(run: Path, scratch: Path, failing: int) -> None:
    warnings.simplefilter("default")
    import lightning.pytorch as pl

    from meshwright.trace.lightning import RecordCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build()

        def training_step(self, batch: Tensor, number: int) -> Tensor:
            if number == failing:
                raise ValueError("mine")
            return self.inner(batch).square().mean()

        def validation_step(self, batch: Tensor) -> None:
            self.inner(batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer: Any = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=12,
        accumulate_grad_batches=2,
        val_check_interval=8,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        default_root_dir=scratch,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RecordCallback(run)],
    )
    trainer.fit(Module(), batches(24), batches(1))


def test_lightnings_trainer_records_itself_by_its_callback(tmp_path: Path) -> None:
    run_ranks(1, train_by_lightning, tmp_path / "run", tmp_path / "trainer", -1)
    run = Read(tmp_path / "run")
    whole(run, 12)
    assert run.program.trainer.startswith("Lightning 2") and run.program.flops_per_step == 2 * step_flops()
    assert all(line.loss is not None for line in run.metrics)
    assert len(run.spans("evaluation")) == 3 and len(run.spans("checkpoint")) >= 1


def test_what_lightnings_trainer_fails_at_is_told(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ValueError: mine"):
        run_ranks(1, train_by_lightning, tmp_path / "run", tmp_path / "trainer", 9)
    run = Read(tmp_path / "run")
    # Four whole steps; the ninth batch is the second of the fifth.
    assert len(run.metrics) == 4 and run.of(Ended) == []
    assert run.faults() == ["ValueError: mine"]


def test_several_models_and_optimizers_are_one_program(tmp_path: Path) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with record(tmp_path / "run", list(model), [optimizer]) as recorder:
        for batch in recorder.steps(batches(12)):
            update(model, optimizer, batch)
    whole(Read(tmp_path / "run"), 12)
