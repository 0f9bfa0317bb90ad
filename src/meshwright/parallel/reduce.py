"""The step's one small synchronisation, and the gradient norm it completes."""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from meshwright.parallel.part import local
from meshwright.spec import Layout


class StepTotals(NamedTuple):
    """What all ranks agree on at a step's end: loss, squared gradient norm, stop requests, in one fp32 tensor [3].

    loads: of a mixture, each layer's balance loss and tokens of each expert [layers, 1 + X]; None of other models.
    All of it stays on the device until somebody reads it, so that reading can wait.
    """

    values: torch.Tensor
    loads: torch.Tensor | None = None

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
        loads = None if self.loads is None else self.loads.to("cpu", non_blocking=True)
        return StepTotals(self.values.to("cpu", non_blocking=True), loads)

    def expert_load(self) -> float | None:
        """Tokens of the fullest expert over its layer's mean, in the layer where that is largest: 1 if all are alike.

        None of a model without a mixture. Reads the loads, so on the host's copy only.
        """
        if self.loads is None:
            return None
        counts = self.loads[:, 1:]
        counts = counts[counts.sum(1) > 0]
        return float((counts.amax(1) / counts.mean(1)).max()) if len(counts) else None

    def balance_loss(self) -> float | None:
        """What the balance loss of all layers adds to the loss; None of a model without a mixture. On the host."""
        return None if self.loads is None else float(self.loads[:, 0].sum())


def local_gradients(model: nn.Module) -> list[torch.Tensor]:
    """This rank's part of every gradient that is there."""
    return [local(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]


def squared_norm(model: nn.Module, but: nn.Parameter | None = None) -> torch.Tensor:
    """This rank's part of the squared gradient norm: adds up over ranks to the whole, each element counted once.

    but: a parameter that is counted elsewhere.
    """
    by_copies: dict[int, list[torch.Tensor]] = {}
    for parameter in model.parameters():
        if parameter.grad is not None and parameter is not but:
            by_copies.setdefault(copies(parameter.grad), []).append(local(parameter.grad))
    # In fp32 whatever the gradients are in: sums in bf16 are off by more than clipping should be.
    parts = [
        torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, dtype=torch.float32))).square() / count
        for count, tensors in by_copies.items()
    ]
    return torch.stack(parts).sum()


def copies(tensor: torch.Tensor) -> int:
    """How many ranks of the world hold the same part of `tensor`.

    A DTensor's mesh has all ranks of its pipeline stage. Asks each placement whether it replicates: strided shards are
    no instance of Shard, so asking that way would miscount them.
    """
    if not isinstance(tensor, DTensor):
        return dist.get_world_size()
    return math.prod(
        size for size, p in zip(tensor.device_mesh.shape, tensor.placements, strict=True) if p.is_replicate()
    )


def reduce_step(
    loss: torch.Tensor, squared: torch.Tensor, layout: Layout, *, stop: bool, loads: torch.Tensor | None = None
) -> StepTotals:
    """Sum loss, squared gradient norm, stop requests and loads over all ranks in one all-reduce, without reading them.

    The ranks along tensor share their samples, and each has their whole loss; but each routes tokens of its own. Along
    pipeline one of them has the loss, and each the loads of its own layers.
    """
    loss = loss.detach().float() / layout.tensor
    # Gradients that are offloaded have their norm on the host.
    values = torch.stack([loss, squared.to(loss.device), torch.full_like(loss, float(stop))])
    totals = values if loads is None else torch.cat((values, loads.flatten()))
    dist.all_reduce(totals)
    return StepTotals(totals[:3], None if loads is None else totals[3:].view_as(loads))


@torch.no_grad()
def clip_gradients(model: nn.Module, gradient_norm: torch.Tensor, clip_norm: float) -> None:
    """Scale gradients so that their norm is at most `clip_norm` (0: leave them).

    Reads nothing back to the host, except where the gradients are there.
    """
    if clip_norm > 0:
        scale = (clip_norm / (gradient_norm + 1e-6)).clamp(max=1.0)
        gradients = local_gradients(model)
        torch._foreach_mul_(gradients, scale.to(gradients[0].device))


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """`value` summed over all ranks, in place."""
    dist.all_reduce(value)
    return value
