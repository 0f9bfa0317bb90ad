"""Backward passes cut in two: matrix products give the gradient of their input at once, that of their weight later."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.models import Head


class Later:
    """The products that backward passes have put off, by whoever owns them."""

    def __init__(self) -> None:
        self._products: list[Callable[[], None]] = []

    def put_off(self, product: Callable[[], None]) -> None:
        """Remember a product of the backward pass that runs now."""
        self._products.append(product)

    def take(self) -> list[Callable[[], None]]:
        """All that were put off since the last time."""
        taken, self._products = self._products, []
        return taken


def put_products_off(model: nn.Module, later: Later) -> None:
    """Have every matrix of the model put the product for its weight's gradient off, whenever a backward pass meets it.

    The other gradients (norms, biases, the embedding) are cheap, and are there at once.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = partial(linear, module, later)  # pyright: ignore[reportAttributeAccessIssue]
        elif isinstance(module, Head):
            module.product = partial(ProductLater.apply, later)


def linear(module: nn.Linear, later: Later, x: Tensor) -> Tensor:
    """A linear layer's forward pass; x: [..., inputs]."""
    made = ProductLater.apply(later, x, module.weight)
    assert isinstance(made, Tensor)
    return made if module.bias is None else made + module.bias


class ProductLater(torch.autograd.Function):
    """x [..., inputs] times the transpose of weight [outputs, inputs]."""

    @staticmethod
    def forward(ctx: Any, later: Later, x: Tensor, weight: Tensor) -> Tensor:
        """[..., outputs]."""
        ctx.save_for_backward(x)
        # The parameter itself, not a saved view of it: its gradient is put there later.
        ctx.weight, ctx.later = weight, later
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        """The gradient of x."""
        (x,) = ctx.saved_tensors
        ctx.later.put_off(partial(add_gradient, ctx.weight, x.detach(), gradients[0].detach()))
        return None, gradients[0] @ ctx.weight, None


@torch.no_grad()
def add_gradient(weight: Tensor, x: Tensor, gradient: Tensor) -> None:
    """Add a product's part to its weight's gradient; gradient: [..., outputs], of the product."""
    part = gradient.flatten(0, -2).T @ x.flatten(0, -2)
    if weight.grad is None:
        weight.grad = part
    else:
        weight.grad += part
