"""What all ranks learn of how evenly a mixture's experts are used, and the biases that follow from it."""

import torch
from torch import Tensor, nn

from meshwright.parallel.expert import mixtures_of
from meshwright.parallel.pipeline import Stages
from meshwright.parallel.reduce import StepTotals


def take_loads(model: Stages) -> Tensor | None:
    """This rank's part of the step's loads, fp32 [layers, 1 + X]: each layer's balance loss and tokens of each expert.

    Layers without experts, or on other ranks, are 0. None for a model without a mixture. What was counted is taken: the
    next step begins anew.
    """
    layers, experts = model.spec.layers, model.spec.experts
    if experts is None:
        return None
    loads = torch.zeros(layers, 1 + experts.count, device=model.pipe.device)
    for mixture in mixtures_of(model):
        loads[mixture.layer] = mixture.experts.load.take(loads[mixture.layer, 1:])
    return loads


@torch.no_grad()
def move_biases(model: nn.Module, totals: StepTotals) -> None:
    """Move the bias that each router chooses by against the load that its experts had in the whole global batch.

    By a fixed step and the sign of the error, as arXiv:2412.19437, section 2.1.2, does it.
    """
    for mixture in mixtures_of(model):
        rate, bias = mixture.experts.settings.bias_rate, mixture.router.bias
        if rate and bias is not None and totals.loads is not None:
            # In int64, because above 2^24 choices fp32 rounds, and the sign of a small error with it.
            counts = totals.loads[mixture.layer, 1:].long()
            # The error times the number of experts: a whole number, so that its sign is exact.
            bias += rate * (counts.sum() - len(counts) * counts).sign()
