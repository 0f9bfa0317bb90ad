"""Held-out loss."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from meshwright.data import Stream, to_tensor
from meshwright.parallel import data_rank, free_gathered, sum_over_ranks
from meshwright.spec import Job
from meshwright.train.setup import Loss


@torch.no_grad()
def evaluate(
    model: nn.Module, loss_of: Loss, stream: Stream, job: Job, mesh: DeviceMesh, device: torch.device
) -> float | None:
    """Mean loss over the first evaluation.sequences held-out samples, nats per token; None if none are held out.

    Ranks take samples in turn. Every rank runs the same number of batches, because a sharded forward pass is a
    collective; where samples run out a rank repeats the first one and does not count it.
    """
    samples = min(job.evaluation.sequences, stream.held_out_samples)
    if samples == 0:
        return None
    layout = job.layout
    per_round = layout.data_size * layout.microbatch
    total = torch.zeros((), device=device)
    for start in range(0, samples, per_round):
        first = start + data_rank(mesh) * layout.microbatch
        count = max(0, min(layout.microbatch, samples - first))
        inputs, targets = stream.held_out_batch(first, count) if count else stream.held_out_batch(0, 1)
        loss = loss_of(model(to_tensor(inputs, device)), to_tensor(targets, device))
        if count:
            total += loss
    free_gathered(model)
    return float(sum_over_ranks(total)) / (samples * job.data.sequence)
