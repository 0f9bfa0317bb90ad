"""Held-out loss."""

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh

from meshwright.data import Batch, Samples, Tokens, to_tensors
from meshwright.models import NOT_COUNTED
from meshwright.parallel import Loss, Stages, data_rank, sum_over_ranks
from meshwright.spec import Job


@torch.no_grad()
def evaluate(
    model: Stages, loss_of: Loss, stream: Samples, job: Job, mesh: DeviceMesh, device: torch.device
) -> float | None:
    """Mean loss over the first evaluation.sequences held-out samples, nats per counted token; None if there is none.

    Ranks take samples in turn. Every rank runs the same number of batches, because a sharded forward pass is a
    collective, and all of them as large as in training, so that a compiled block meets no other shape. Where samples
    run out a batch is filled up with the last one, and what does not count is masked.
    """
    samples = min(job.evaluation.sequences, stream.held_out_samples)
    if samples == 0:
        return None
    layout = job.layout
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for start in range(0, samples, layout.data_size * layout.microbatch):
        first = start + data_rank(mesh) * layout.microbatch
        batch = to_tensors(held_out(stream, first, layout.microbatch, samples), device)
        held = model.cut(batch)
        logits = model(held.tokens, held.view)
        if logits is not None:
            total[0] += loss_of(logits, held.targets)
            total[1] += (held.targets != NOT_COUNTED).sum()
    model.free()
    loss, counted = sum_over_ranks(total).tolist()
    return loss / counted if counted else None


def held_out(stream: Samples, first: int, count: int, samples: int) -> Batch[Tokens]:
    """`count` held-out samples from `first` on; past the last of `samples`, its repetition with targets not counted."""
    batches = [stream.held_out_batch(min(number, samples - 1), 1) for number in range(first, first + count)]
    tokens, targets, documents = zip(*batches, strict=True)
    counted = np.concatenate(targets)
    counted[max(0, samples - first) :] = NOT_COUNTED
    return Batch(np.concatenate(tokens), counted, None if documents[0] is None else np.concatenate(documents))
