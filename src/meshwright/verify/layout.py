"""One rank of a layout, run as the trainer runs it and held against the reference as it goes."""

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from meshwright.data import Batch
from meshwright.parallel import (
    build_loss,
    build_mesh,
    build_parallel_model,
    free_gathered,
    local_part,
)
from meshwright.record import RunFolder
from meshwright.record.verification import Comparison, RankReport
from meshwright.spec import Job
from meshwright.trace import MemoryProbe, Recorder
from meshwright.train import loop
from meshwright.train.evaluate import logits_of
from meshwright.train.optimizer import build_optimizer
from meshwright.train.setup import build_batches, open_data
from meshwright.verify.alone import GRADIENT, OUTPUT, SAMPLES, WEIGHT, compare, watching

Offset = tuple[int, ...]


class ReferenceFile:
    """The reference's tensors on disk; of each only the part that is asked for is read."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt")
        self._names = set(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's whole shape."""
        return tuple(self._file.get_slice(name).get_shape())

    def read(self, name: str, offset: Offset, shape: tuple[int, ...]) -> Tensor:
        """A block of a tensor."""
        block = tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))
        return self._file.get_slice(name)[block] if shape else self._file.get_tensor(name)

    def compare(self, name: str, ours: Tensor, offset: Offset) -> Comparison:
        """A part of ours against the same part of the reference."""
        return compare(ours, self.read(name, offset, tuple(ours.shape)))

    def compare_parts(self, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Comparison]:
        """This rank's parts of whole tensors."""
        found: dict[str, Comparison] = {}
        for name, tensor in tensors.items():
            local, offset, _ = local_part(tensor)
            found[name] = self.compare(prefix + name, local, offset)
        return found


def run_layout(job: Job, folder: RunFolder, attempt: int, device: torch.device, reference: Path) -> RankReport:
    """Train the job's steps on this rank with the trainer's own parts. Called after start_distributed."""
    file = ReferenceFile(reference)
    mesh = build_mesh(job.layout, device)
    memory = MemoryProbe(device)
    stream = open_data(job)
    model = build_parallel_model(job, mesh, device)
    optimizer = build_optimizer(model, job.optimizer)
    loss_of = build_loss(job, mesh, device)
    batches = build_batches(stream, job, mesh, device)
    recorder = Recorder(folder, attempt, job, device, began_s=0.0)
    losses: list[float] = []
    norms: list[float] = []
    foreign, outputs, gradients = -1, {}, {}
    for step in range(job.run.steps):
        share = batches.next(step)
        if step == 0:
            foreign = first_foreign(file, share.microbatches, job, mesh)
            outputs = compare_outputs(file, model, share.microbatches, job, mesh)
        loss = loop.forward_backward(model, share, loss_of, job, recorder, memory)
        if step == 0:
            gradients = file.compare_parts(
                GRADIENT, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            )
        totals, _ = loop.update(step, model, optimizer, loss, job, recorder, memory, stop=False)
        losses.append(totals.loss.item())
        norms.append(totals.gradient_norm.item())
    weights = file.compare_parts(WEIGHT, dict(model.named_parameters()))
    batches.close()
    recorder.close("finished")
    return RankReport(
        rank=dist.get_rank(),
        foreign=foreign,
        outputs=outputs,
        gradients=gradients,
        weights=weights,
        losses=losses,
        norms=norms,
    )


def first_sample(job: Job, mesh: DeviceMesh, microbatch: int) -> int:
    """Index in the global batch of a microbatch's first sample on this rank.

    By the layout's own arithmetic, not by the trainer's: ranks are counted along replica and shard here once more.
    """
    replica, shard = mesh["replica"].get_local_rank(), mesh["shard"].get_local_rank()
    share = job.data.global_batch // job.layout.data_size
    return (replica * job.layout.shard + shard) * share + microbatch * job.layout.microbatch


def first_foreign(file: ReferenceFile, microbatches: list[Batch[Tensor]], job: Job, mesh: DeviceMesh) -> int:
    """The first of this rank's samples that is not the one it should have; -1 where all are."""
    for number, batch in enumerate(microbatches):
        first = first_sample(job, mesh, number)
        wanted = file.read(SAMPLES, (first, 0), tuple(batch.tokens.shape))
        wrong = (batch.tokens.cpu() != wanted).any(dim=1).nonzero()
        if len(wrong):
            return first + int(wrong[0])
    return -1


@torch.no_grad()
def compare_outputs(
    file: ReferenceFile, model: nn.Module, microbatches: list[Batch[Tensor]], job: Job, mesh: DeviceMesh
) -> dict[str, Comparison]:
    """Every module's output over this rank's samples of the first step, in a forward pass of its own.

    Not compiled: a compiled block's modules cannot be looked into.
    """
    found: dict[str, Comparison] = {}
    for number, batch in enumerate(microbatches):
        seen: dict[str, Tensor] = {}
        with torch.compiler.set_stance("force_eager"), watching(model, seen):
            logits_of(model, batch)
        for name, output in seen.items():
            offset, local = locate(output, file.shape(OUTPUT + name), mesh)
            part = file.compare(OUTPUT + name, local, (offset[0] + first_sample(job, mesh, number), *offset[1:]))
            found[name] = found.get(name, Comparison()) + part
    free_gathered(model)
    return found


def locate(output: Tensor, whole: tuple[int, ...], mesh: DeviceMesh) -> tuple[Offset, Tensor]:
    """Where a module's output [samples, ...] stands in the whole one, along all dims but the first.

    Plain tensors are split evenly along tensor: sequences, heads and widths divide. Where heads are shared by several
    ranks, there are fewer different parts than ranks.
    """
    if isinstance(output, DTensor):
        local, offset, _ = local_part(output)
        return offset, local
    rank, size = mesh["tensor"].get_local_rank(), mesh["tensor"].size()
    dims = zip(output.shape[1:], whole[1:], strict=True)
    return (0, *(rank * (full // part) // size * part for part, full in dims)), output
