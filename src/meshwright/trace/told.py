"""What a program says of its steps."""

import math
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from meshwright.record import Metrics


class Told(msgspec.Struct, kw_only=True):
    """What the program says of a step; a loss that the device still computes stands in memory that it will be copied
    to."""

    loss: Any = None
    gradient_norm: Any = None
    learning_rate: float | None = None
    tokens: int | None = None

    def line(self, *, step_s: float, tokens: int | None, **known: Any) -> Metrics:
        """The step as a line of metrics. tokens: of a step, where the program has said nothing of this one's."""
        tokens = self.tokens or tokens
        return Metrics(
            loss=finite(self.loss),
            gradient_norm=finite(self.gradient_norm),
            learning_rate=self.learning_rate,
            step_s=step_s,
            tokens_per_s=tokens / step_s if tokens and step_s > 0 else None,
            **known,
        )


def scalar(value: Tensor | float) -> Any:
    """A number; of a tensor on a GPU, host memory into which it will have been copied when the device is there."""
    if not isinstance(value, Tensor):
        return float(value)
    own = value.detach()
    own = own.to_local() if isinstance(own, DTensor) else own
    if own.device.type == "cpu":
        return float(own)
    there = torch.empty((), dtype=own.dtype, pin_memory=True)
    return there.copy_(own.reshape(()), non_blocking=True)


def finite(value: Any) -> float | None:
    """A number that JSON has a word for, or None."""
    number = None if value is None else float(value)
    return number if number is not None and math.isfinite(number) else None
