"""The real trainer on forked ranks."""

import shutil
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from ranks import run_ranks
from torch.distributed.tensor import DTensor

from meshwright.account import MemoryAccount, StepAccount
from meshwright.checkpoint import read_model_weights
from meshwright.models import build_model
from meshwright.parallel import start_distributed, stop_distributed
from meshwright.record import Metrics, Prediction, RunFolder, create_run, read_metrics, start_attempt
from meshwright.spec import Job
from meshwright.spec.decode import encode_job
from meshwright.train import loop
from meshwright.train.setup import StopRequest

Tensors = dict[str, torch.Tensor]


def new_run(job: Job) -> tuple[RunFolder, int]:
    """A run folder with its first attempt."""
    folder = create_run(Path(job.run.folder) / job.run.name, encode_job(job))
    return folder, new_attempt(folder, job)


def new_attempt(folder: RunFolder, job: Job) -> int:
    """One more attempt, without a prediction worth the name."""
    blank = Prediction(layout=job.layout, step=StepAccount(), memory=MemoryAccount(), step_s=1.0, tokens_per_s=1.0)
    return start_attempt(folder, blank)


def train_rank(job: Job, folder: RunFolder, attempt: int, patches: dict[str, Any] | None = None) -> Tensors:
    """One rank's whole life, in the test's process; returns the whole gradients of its first step, before clipping."""
    gradients: Tensors = {}
    reduce_step = loop.reduce_step
    names: dict[int, str] = {}
    build = loop.build_parallel_model

    def building(*arguments: Any) -> torch.nn.Module:
        model = build(*arguments)
        names.update({id(parameter): name for name, parameter in model.named_parameters()})
        built.append(model)
        return model

    def reducing(*arguments: Any, **options: Any) -> Any:
        if not gradients:
            for name, parameter in built[0].named_parameters():
                grad = parameter.grad
                assert grad is not None
                gradients[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
        return reduce_step(*arguments, **options)

    built: list[torch.nn.Module] = []
    torch.set_num_threads(1)
    device = start_distributed(job.cluster)
    with mock.patch.multiple(loop, build_parallel_model=building, reduce_step=reducing, **(patches or {})):
        loop.train(job, folder, attempt, device, StopRequest(), began_s=time.time())
    stop_distributed()
    return gradients


def train_layout(job: Job) -> tuple[list[Metrics], Tensors, Tensors]:
    """Train on all ranks; metrics of each step, whole gradients of the first, weights after the last."""
    folder, attempt = new_run(job)
    gradients = run_ranks(job.layout.world_size, train_rank, job, folder, attempt)[0]
    return read_metrics(folder)[0], gradients, weights(job, folder)


def weights(job: Job, folder: RunFolder) -> Tensors:
    """Whole weights in a run's newest checkpoint."""
    model = build_model(job.model, device="cpu")
    read_model_weights(folder.checkpoint(folder.saved_steps()[-1]), model)
    return dict(chain(model.named_parameters(), model.named_buffers()))


def train_in_turns(turns: Sequence[tuple[Job, int]]) -> RunFolder:
    """One run that several jobs train, each from where the one before left off to the checkpoint after its step.

    The jobs save every step and keep all; each trains to its end, and what is past its turn is taken away.
    """
    folder = RunFolder(Path(turns[0][0].run.folder) / turns[0][0].run.name)
    for job, until in turns:
        attempt = new_attempt(folder, job) if folder.path.exists() else new_run(job)[1]
        run_ranks(job.layout.world_size, train_rank, job, folder, attempt)
        for later in folder.saved_steps():
            if later > until:
                shutil.rmtree(folder.checkpoint(later))
    return folder


def assert_same_training(job: Job, found: RunFolder, wanted: RunFolder) -> None:
    """Fail where two runs of a job differ by more than round-off: losses, held out too, norms, weights at the end."""
    steps, evaluations = read_metrics(found)
    steps_wanted, evaluations_wanted = read_metrics(wanted)
    assert [line.step for line in steps] == [line.step for line in steps_wanted]
    for line, right in zip(steps, steps_wanted, strict=True):
        assert line.loss == pytest.approx(right.loss, rel=1e-5)
        assert line.gradient_norm == pytest.approx(right.gradient_norm, rel=1e-5)
    # Each job evaluates before its first step too.
    losses = {line.step: line.held_out_loss for line in evaluations}
    for right in evaluations_wanted:
        assert losses[right.step] == pytest.approx(right.held_out_loss, rel=1e-5)
    end = weights(job, wanted)
    for name, tensor in weights(job, found).items():
        # Adam amplifies round-off where a gradient is nearly zero, so norms are compared, not elements.
        assert (tensor - end[name]).norm() <= 1e-5 * end[name].norm(), name
