"""Backward passes cut in two: matrix products give the gradient of their input at once, that of their weight later."""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.models import Head


class Product(NamedTuple):
    """What a weight's gradient is computed from: x [..., inputs], which its layer was given, and the gradient of what
    that made, [..., outputs]."""

    weight: nn.Parameter
    x: Tensor
    gradient: Tensor

    @torch.no_grad()
    def add(self) -> None:
        """Add its part to the weight's gradient.

        In fp32, as FSDP adds up gradients that it has not reduced yet. It would move this one there by itself, but
        only in the stage's next backward pass: what is added before would be summed in the compute precision, and
        after the step's last it would meet the stage's other gradients in another precision, which FSDP refuses.
        """
        part = self.gradient.flatten(0, -2).T @ self.x.flatten(0, -2)
        if self.weight.grad is None:
            self.weight.grad_dtype = torch.float32
            self.weight.grad = part.float()
        else:
            self.weight.grad += part


class Later:
    """The products that backward passes have put off, by whoever owns them."""

    def __init__(self) -> None:
        self._products: list[Product] = []

    def put_off(self, product: Product) -> None:
        """Remember a product of the backward pass that runs now."""
        self._products.append(product)

    def take(self) -> list[Product]:
        """All that were put off since the last time."""
        taken, self._products = self._products, []
        return taken


def put_products_off(model: nn.Module, later: Later) -> None:
    """Have every linear layer and the head put the product for its weight's gradient off, whenever a backward pass
    meets it.

    The other gradients are there at once: of norms, biases and the embedding, which are cheap, and of a mixture's
    router and routed experts, whose matrices are no linear layers but stacks, multiplied as a group.
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
        ctx.later.put_off(Product(ctx.weight, x.detach(), gradients[0].detach()))
        return None, gradients[0] @ ctx.weight, None
