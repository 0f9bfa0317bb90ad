"""What a program says of its steps."""

import math
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Told(msgspec.Struct, kw_only=True):
    """What the program says of a step; a loss that the device still computes stands in memory that it will be copied
    to."""

    loss: Any = None
    gradient_norm: Any = None
    learning_rate: float | None = None
    tokens: int | None = None


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
