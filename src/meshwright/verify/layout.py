"""One rank of a layout, run as the trainer runs it and held against the reference as it goes."""

from itertools import chain, pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from meshwright.data import Batch
from meshwright.parallel import (
    Stages,
    build_loss,
    build_mesh,
    build_parallel_model,
    cut_sequence,
    local_part,
)
from meshwright.record import RunFolder
from meshwright.record.verification import Comparison, RankReport
from meshwright.spec import Job, ModelSpec, home_of
from meshwright.trace import MemoryProbe, Recorder
from meshwright.train import loop
from meshwright.train.optimizer import build_optimizer, set_learning_rate
from meshwright.train.setup import build_batches, open_data
from meshwright.verify.alone import GRADIENT, OUTPUT, SAMPLES, WEIGHT, compare, watching

Offset = tuple[int, ...]


class ReferenceFile:
    """The reference's tensors on disk; of each only the part that is asked for is read."""

    def __init__(self, path: Path, model: ModelSpec) -> None:
        self._model = model
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
            home = home_of(self._model, name)
            found[home] = found.get(home, Comparison()) + self.compare(prefix + home, local, offset)
        return found


def run_layout(job: Job, folder: RunFolder, attempt: int, device: torch.device, reference: Path) -> RankReport:
    """Train the job's steps on this rank with the trainer's own parts. Called after start_distributed."""
    file = ReferenceFile(reference, job.model)
    mesh = build_mesh(job.layout, device)
    memory = MemoryProbe(device)
    stream = open_data(job)
    model = build_parallel_model(job, mesh, device)
    optimizer = build_optimizer(model, job.optimizer, job.layout.offload)
    loss_of = build_loss(job, mesh, device)
    batches = build_batches(stream, job, mesh, device)
    recorder = Recorder(folder, attempt, job, device, began_s=0.0)
    losses: list[float] = []
    norms: list[float] = []
    foreign, misplaced, outputs, gradients = -1, -1, {}, {}
    for step in range(job.run.steps):
        share = batches.next(step)
        if step == 0:
            foreign = first_foreign(file, share.microbatches, job, mesh)
            misplaced = first_misplaced(share.microbatches[0], job, mesh)
            outputs = compare_outputs(file, model, share.microbatches, job, mesh)
        loss = loop.forward_backward(model, share, loss_of, recorder, memory)
        if step == 0:
            gradients = file.compare_parts(
                GRADIENT, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            )
        set_learning_rate(optimizer, step, job)
        totals = loop.update(model, optimizer, loss, job, recorder, memory, stop=False)
        losses.append(totals.loss.item())
        norms.append(totals.gradient_norm.item())
    weights = file.compare_parts(WEIGHT, dict(chain(model.named_parameters(), model.named_buffers())))
    batches.close()
    recorder.close("finished")
    return RankReport(
        rank=dist.get_rank(),
        foreign=foreign,
        misplaced=misplaced,
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


def first_misplaced(batch: Batch[Tensor], job: Job, mesh: DeviceMesh) -> int:
    """The first of this rank's tokens of a sample that does not stand where it should; -1 where all do.

    By its own count: walking through the sequence, a token's place is one more than the one before it, or 0 where a
    document begins.
    """
    held = cut_sequence(batch, job.model, job.layout, mesh)
    size, rank = job.layout.context, mesh["context"].get_local_rank()
    # Two chunks of a sequence that is cut; without a context axis there may be no two equal ones.
    length = batch.tokens.shape[1] // (2 * size)
    chunks = [slice(n * length, (n + 1) * length) for n in (rank, 2 * size - 1 - rank)] if size > 1 else [slice(None)]
    documents = torch.zeros_like(batch.tokens) if batch.documents is None else batch.documents
    for sample, places in zip(documents.tolist(), held.view.places.expand_as(held.tokens).tolist(), strict=True):
        wanted = [0]
        for before, document in pairwise(sample):
            wanted.append(wanted[-1] + 1 if document == before else 0)
        mine = [place for chunk in chunks for place in wanted[chunk]]
        wrong = [number for number, (place, right) in enumerate(zip(places, mine, strict=True)) if place != right]
        if wrong:
            return wrong[0]
    return -1


@torch.no_grad()
def compare_outputs(
    file: ReferenceFile, model: Stages, microbatches: list[Batch[Tensor]], job: Job, mesh: DeviceMesh
) -> dict[str, Comparison]:
    """Every module's output over this rank's samples of the first step, in a forward pass of its own.

    Not compiled: a compiled block's modules cannot be looked into.
    """
    found: dict[str, Comparison] = {}
    for number, batch in enumerate(microbatches):
        seen: dict[str, Tensor] = {}
        held = model.cut(batch)
        with torch.compiler.set_stance("force_eager"), watching(model, seen):
            model(held.tokens, held.view)
        first = first_sample(job, mesh, number)
        for name, output in seen.items():
            for offset, local in locate(output, file.shape(OUTPUT + name), mesh):
                part = file.compare(OUTPUT + name, local, (offset[0] + first, *offset[1:]))
                found[name] = found.get(name, Comparison()) + part
    model.free()
    return found


def locate(output: Tensor, whole: tuple[int, ...], mesh: DeviceMesh) -> list[tuple[Offset, Tensor]]:
    """Where a module's output [samples, S, ...] stands in the whole one, along all dims but the first, in pieces.

    Plain tensors are split evenly along tensor: sequences, heads and widths divide. Where heads are shared by several
    ranks, there are fewer different parts than ranks. Along context, what the ranks of tensor split is two stretches
    of the sequence: one counted from its start, and one of the same length counted from its end.
    """
    context, size = mesh["context"], mesh["tensor"].size()
    cut = (whole[0], whole[1] // context.size(), *whole[2:])
    if isinstance(output, DTensor):
        output, offset, _ = local_part(output)
    else:
        dims = zip(output.shape[1:], cut[1:], strict=True)
        offset = (0, *(mesh["tensor"].get_local_rank() * (full // part) // size * part for part, full in dims))
    if context.size() == 1:
        return [(offset, output)]
    length, rank = cut[1] // 2, context.get_local_rank()
    turn = min(max(0, length - offset[1]), output.shape[1])  # tokens of it that are in the first stretch
    early, late = output[:, :turn], output[:, turn:]
    starts = rank * length + offset[1], whole[1] - (rank + 1) * length + max(0, offset[1] - length)
    pieces = zip(starts, (early, late), strict=True)
    return [((offset[0], start, *offset[2:]), piece) for start, piece in pieces if piece.shape[1]]
