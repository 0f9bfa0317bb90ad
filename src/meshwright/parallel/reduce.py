"""The step's one small synchronisation, and the gradient norm it completes."""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from meshwright.spec import Layout


class StepTotals(NamedTuple):
    """What all ranks agree on at a step's end: loss, squared gradient norm, stop requests, in one fp32 tensor [3].

    It stays on the device until somebody reads it, so that reading can wait.
    """

    values: torch.Tensor

    @property
    def loss(self) -> torch.Tensor:
        """Mean over the global batch's tokens, nats."""
        return self.values[0]

    @property
    def gradient_norm(self) -> torch.Tensor:
        """Of the whole gradient, before clipping."""
        return self.values[1].sqrt()

    @property
    def stop(self) -> torch.Tensor:
        """How many ranks were asked to stop."""
        return self.values[2]

    def to_host(self) -> "StepTotals":
        """A copy on its way to the host; whole once the device has come to this point."""
        return StepTotals(self.values.to("cpu", non_blocking=True))


def local_gradients(model: nn.Module) -> list[torch.Tensor]:
    """This rank's part of every gradient that is there."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [g.to_local() if isinstance(g, DTensor) else g for g in gradients]


def squared_norm(model: nn.Module) -> torch.Tensor:
    """This rank's part of the squared gradient norm: adds up over ranks to the whole, each element counted once."""
    by_copies: dict[int, list[torch.Tensor]] = {}
    for parameter in model.parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            local = grad.to_local() if isinstance(grad, DTensor) else grad
            by_copies.setdefault(copies(grad), []).append(local)
    # In fp32 whatever the gradients are in: sums in bf16 are off by more than clipping should be.
    parts = [
        torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, dtype=torch.float32))).square() / count
        for count, tensors in by_copies.items()
    ]
    return torch.stack(parts).sum()


def copies(tensor: torch.Tensor) -> int:
    """How many ranks of the world hold the same part of `tensor`.

    Asks each placement whether it replicates: strided shards are no instance of Shard, so asking that way
    would miscount them.
    """
    if not isinstance(tensor, DTensor):
        return dist.get_world_size()
    splits = [size for size, p in zip(tensor.device_mesh.shape, tensor.placements, strict=True) if not p.is_replicate()]
    return dist.get_world_size() // math.prod(splits)


def reduce_step(loss: torch.Tensor, squared: torch.Tensor, layout: Layout, *, stop: bool) -> StepTotals:
    """Sum loss, squared gradient norm and stop requests over all ranks in one all-reduce, without reading them.

    The ranks along tensor share their samples, and each has their whole loss.
    """
    loss = loss.detach().float() / layout.tensor
    totals = torch.stack([loss, squared, torch.full_like(squared, float(stop))])
    dist.all_reduce(totals)
    return StepTotals(totals)


@torch.no_grad()
def clip_gradients(model: nn.Module, gradient_norm: torch.Tensor, clip_norm: float) -> None:
    """Scale gradients so that their norm is at most `clip_norm` (0: leave them). Reads nothing back to the host."""
    if clip_norm > 0:
        scale = (clip_norm / (gradient_norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(local_gradients(model), scale)


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """`value` summed over all ranks, in place."""
    dist.all_reduce(value)
    return value
