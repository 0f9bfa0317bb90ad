"""Held-out loss."""

import numpy as np
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from meshwright.data import Stream, Tokens, to_tensor
from meshwright.models import NOT_COUNTED
from meshwright.parallel import data_rank, free_gathered, sum_over_ranks
from meshwright.spec import Job
from meshwright.train.setup import Loss


@torch.no_grad()
def evaluate(
    model: nn.Module, loss_of: Loss, stream: Stream, job: Job, mesh: DeviceMesh, device: torch.device
) -> float | None:
    """Mean loss over the first evaluation.sequences held-out samples, nats per token; None if none are held out.

    Ranks take samples in turn. Every rank runs the same number of batches, because a sharded forward pass is a
    collective, and all of them as large as in training, so that a compiled block meets no other shape. Where samples
    run out a batch is filled up with the last one, and what does not count is masked.
    """
    samples = min(job.evaluation.sequences, stream.held_out_samples)
    if samples == 0:
        return None
    layout = job.layout
    total = torch.zeros((), device=device)
    for start in range(0, samples, layout.data_size * layout.microbatch):
        first = start + data_rank(mesh) * layout.microbatch
        inputs, targets = held_out(stream, first, layout.microbatch, samples)
        total += loss_of(model(to_tensor(inputs, device)), to_tensor(targets, device))
    free_gathered(model)
    return float(sum_over_ranks(total)) / (samples * job.data.sequence)


def held_out(stream: Stream, first: int, count: int, samples: int) -> tuple[Tokens, Tokens]:
    """`count` held-out samples from `first` on; past the last of `samples`, its repetition with targets not counted."""
    pairs = [stream.held_out_batch(min(number, samples - 1), 1) for number in range(first, first + count)]
    inputs, targets = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
    targets[max(0, samples - first) :] = NOT_COUNTED
    return inputs, targets
