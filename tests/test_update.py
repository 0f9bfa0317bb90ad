"""Updates of a rank's own parts."""

from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

from meshwright.parallel import HostAdamW, PartOptimizer

SETTINGS: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "fused": True}


def groups(model: nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in model.parameters() if p.dim() == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]


def train(optimizer: Any, model: nn.Module, steps: int) -> None:
    """Steps on gradients that follow from the weights alone; one parameter has none."""
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = parameter.detach().sin()
        model.get_parameter("0.bias").grad = None
        optimizer.step()


def models(count: int) -> list[nn.Module]:
    made: list[nn.Module] = [nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)) for _ in range(count)]
    for model in made[1:]:
        model.load_state_dict(made[0].state_dict())
    return made


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_states_in_the_hosts_memory_change_no_update() -> None:
    plain, parts, host = models(3)
    train(AdamW(groups(plain), **SETTINGS), plain, 4)
    train(PartOptimizer(AdamW, groups(parts), **SETTINGS), parts, 4)
    train(PartOptimizer(HostAdamW, groups(host), **SETTINGS), host, 4)
    assert_same(plain, parts)
    assert_same(plain, host)


def test_states_that_were_saved_go_on() -> None:
    whole, parted = models(2)
    for kind in (AdamW, HostAdamW):
        train(PartOptimizer(kind, groups(whole), **SETTINGS), whole, 5)
        first = PartOptimizer(kind, groups(parted), **SETTINGS)
        train(first, parted, 2)
        second = PartOptimizer(kind, groups(parted), **SETTINGS)
        for parameter in parted.parameters():
            for name, value in first.states(parameter).items():
                second.set_state(parameter, name, value.clone())
        train(second, parted, 3)
        assert_same(whole, parted)


def test_memory_that_was_exchanged_is_the_one_that_is_updated() -> None:
    """As FSDP does when a parameter is first used."""
    plain, moved = models(2)
    optimizer = PartOptimizer(AdamW, groups(moved), **SETTINGS)
    for parameter in moved.parameters():
        parameter.data = parameter.data.clone()
    train(AdamW(groups(plain), **SETTINGS), plain, 2)
    train(optimizer, moved, 2)
    assert_same(plain, moved)
