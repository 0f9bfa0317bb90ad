"""The optimizer and its schedule."""

import math

from torch import nn
from torch.optim import SGD, AdamW

from meshwright.parallel import HostAdamW, PartOptimizer
from meshwright.spec import Job, Offload, OptimizerSettings


def build_optimizer(model: nn.Module, settings: OptimizerSettings, offload: Offload = "none") -> PartOptimizer:
    """AdamW, or SGD, fused into one kernel for all parameters; weight decay on matrices only.

    offload: "optimizer" keeps AdamW's states in the host's memory.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if settings.name == "sgd":
        return PartOptimizer(SGD, groups, lr=settings.learning_rate, fused=True)
    kind = HostAdamW if offload == "optimizer" else AdamW
    return PartOptimizer(
        kind, groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.epsilon, fused=True
    )


def learning_rate(step: int, steps: int, settings: OptimizerSettings) -> float:
    """Rate of `step` (from 0) of `steps`: linear warmup, then a cosine to learning_rate x final_rate."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step + 1 - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return settings.learning_rate * (settings.final_rate + (1 - settings.final_rate) * cosine)


def set_learning_rate(optimizer: PartOptimizer, step: int, job: Job) -> float:
    """Give the optimizer the rate of `step` and return it."""
    rate = learning_rate(step, job.run.steps, job.optimizer)
    for group in optimizer.groups:
        group["lr"] = rate
    return rate
