"""The optimizer and its schedule."""

import math
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW, Optimizer

from meshwright.parallel import HostAdamW
from meshwright.spec import Job, Offload, OptimizerSettings


def build_optimizer(model: nn.Module, settings: OptimizerSettings, offload: Offload = "none") -> Optimizer:
    """AdamW, fused into one kernel for all parameters, or SGD; weight decay on matrices only.

    offload: "optimizer" keeps AdamW's states in the host's memory.
    """
    groups: dict[tuple[bool, object], dict[str, Any]] = {}
    for parameter in model.parameters():
        # One kernel takes parameters of one mesh, and experts lie on one of their own.
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        decay = settings.weight_decay if parameter.dim() >= 2 else 0.0
        group = groups.setdefault((parameter.dim() >= 2, mesh), {"params": [], "weight_decay": decay})
        group["params"].append(parameter)
    kinds = list(groups.values())
    if settings.name == "sgd":
        # Fused SGD does not know sharded parameters, in torch 2.13.
        return SGD(kinds, lr=settings.learning_rate, foreach=True)
    kind = HostAdamW if offload == "optimizer" else AdamW
    return kind(kinds, lr=settings.learning_rate, betas=settings.betas, eps=settings.epsilon, fused=True)


def learning_rate(step: int, steps: int, settings: OptimizerSettings) -> float:
    """Rate of `step` (from 0) of `steps`: linear warmup, then a cosine to learning_rate x final_rate."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step + 1 - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return settings.learning_rate * (settings.final_rate + (1 - settings.final_rate) * cosine)


def set_learning_rate(optimizer: Optimizer, step: int, job: Job) -> float:
    """Give the optimizer the rate of `step` and return it."""
    rate = learning_rate(step, job.run.steps, job.optimizer)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate
