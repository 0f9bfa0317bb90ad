"""Rehearsing: one rank's steps of a layout of any size, with nobody else there."""

import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import torch

from meshwright.data import Batch, Tokens
from meshwright.parallel import Ledger, build_loss, build_mesh, build_parallel_model, start_silent, stop_distributed
from meshwright.record import RehearsalTask, Rehearsed, RunFolder, replace_text
from meshwright.record.folder import json_text
from meshwright.spec import Job, SettingError
from meshwright.spec.decode import read_job
from meshwright.trace import MemoryProbe, Recorder
from meshwright.train.evaluate import evaluate
from meshwright.train.loop import forward_backward, update
from meshwright.train.optimizer import build_optimizer, set_learning_rate
from meshwright.train.reporter import Moment
from meshwright.train.setup import build_batches
from meshwright.train.worker import REFUSED, no_machine, settle_process

# Documents in an invented sample, where they matter.
DOCUMENTS = 4


class Invented:
    """Samples of tokens drawn evenly from the vocabulary, all of them counted: a rehearsal needs no corpus.

    Each is cut into DOCUMENTS equal documents, where attention asks for them.
    """

    def __init__(self, job: Job) -> None:
        self.global_batch = job.data.global_batch
        # One batch of them leaves behind what training's first evaluation leaves in the allocator.
        self.held_out_samples = 1 if job.data.held_out > 0 else 0
        self._sequence, self._vocabulary, self._seed = job.data.sequence, job.model.vocabulary, job.run.seed
        self._by_document = job.data.attention == "document"

    def batch(self, step: int, first_index: int, count: int) -> Batch[Tokens]:
        """As a stream's."""
        draw = np.random.default_rng((self._seed, step, first_index))
        tokens = draw.integers(self._vocabulary, size=(count, self._sequence + 1))
        documents = None
        if self._by_document:
            places = np.arange(self._sequence) * DOCUMENTS // self._sequence
            documents = np.broadcast_to(places, (count, self._sequence)).copy()
        return Batch(np.ascontiguousarray(tokens[:, :-1]), tokens[:, 1:].copy(), documents)

    def held_out_batch(self, index: int, count: int) -> Batch[Tokens]:
        """As a stream's."""
        return self.batch(0, index, count)

    def counted(self, step: int) -> int:  # noqa: ARG002 (in each step as many)
        """As a stream's."""
        return self.global_batch * self._sequence


def rehearse_run(run: str, attempt: int) -> int:
    """Rehearse the task of a run folder; return the exit code."""
    folder = RunFolder(Path(run))
    job = read_job(folder.job, local=no_machine)
    task = msgspec.json.decode(folder.task.read_bytes(), type=RehearsalTask)
    settle_process(job)
    device, ledger = start_silent(job.cluster, task.rank, job.layout.world_size, task.paces)
    try:
        rehearsed = rehearse(job, folder, attempt, device, ledger, task.steps)
    except SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    except torch.OutOfMemoryError:
        print(f"error: {out_of_memory(device, task.rank)}", file=sys.stderr)
        return REFUSED
    stop_distributed()
    replace_text(folder.rehearsed, json_text(rehearsed))
    return 0


def rehearse(job: Job, folder: RunFolder, attempt: int, device: torch.device, ledger: Ledger, steps: int) -> Rehearsed:
    """Run a rank's first `steps` steps, with the trainer's own passes and update; events go to the run folder.

    Called in a process that start_silent has made a rank.
    """
    began_s = time.time()
    mesh = build_mesh(job.layout, device)
    memory = MemoryProbe(device)
    model = build_parallel_model(job, mesh, device)
    optimizer = build_optimizer(model, job.optimizer, job.layout.offload)
    loss_of = build_loss(job, mesh, device)
    stream = Invented(job)
    batches = build_batches(stream, job, mesh, device)
    recorder = Recorder(folder, attempt, job, device, began_s=began_s)
    with recorder.span("evaluation"):
        evaluate(model, loss_of, stream, job, mesh, device)
    begins: list[Moment] = []
    ends: list[Moment] = []
    steps_s: list[float] = []
    for step in range(steps):
        memory.active = step == 1
        ledger.clear()
        with recorder.step(step):
            begins.append(Moment(device))
            with recorder.phase("input"):
                share = batches.next(step)
            loss = forward_backward(model, share, loss_of, recorder, memory)
            set_learning_rate(optimizer, step, job)
            update(model, optimizer, loss, job, recorder, memory, stop=False)
            ends.append(Moment(device))
            # As in training, the host waits for the step before.
            if step:
                steps_s.append(ends[step - 1].since(begins[step - 1]))
        if memory.active:
            recorder.memory(step, memory.account())
    steps_s.append(ends[-1].since(begins[-1]))
    batches.close()
    recorder.close("finished")
    return Rehearsed(steps_s=tuple(steps_s), asked=ledger.asked())


def out_of_memory(device: torch.device, rank: int) -> SettingError:
    """What a rank that does not fit is told."""
    peak_bytes = torch.cuda.max_memory_allocated(device)
    whole_bytes = torch.cuda.mem_get_info(device)[1]
    reason = f"ran out of the {whole_bytes / 1e9:.1f} GB of this device, {peak_bytes / 1e9:.1f} GB of it in tensors"
    return SettingError(f"--rank {rank}", reason, "a layout that meshwright plan says fits, with some to spare")
