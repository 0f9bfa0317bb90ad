"""Where Meshwright is attached to a program: the only lines of this folder that know it."""

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer


class NotRecorded:
    """What a loop without --record iterates through."""

    def steps(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The loader's batches."""
        return iter(loader)

    def close(self) -> None:
        """Nothing was opened."""


def recorder_of(options: argparse.Namespace, _model: nn.Module, _optimizer: Optimizer) -> NotRecorded:
    """The recorder of a loop of one's own."""
    if options.record:
        sys.exit("--record: this version of Meshwright has no recorder for other programs")
    return NotRecorded()


def callbacks_of(options: argparse.Namespace) -> list[Any]:
    """The callbacks that record a Hugging Face Trainer."""
    if options.record:
        sys.exit("--record: this version of Meshwright has no recorder for other programs")
    return []


def wrapped(options: argparse.Namespace, module: str) -> list[str]:
    """The words after `python -m` that run a module unchanged, recorded if the options say so."""
    return ["meshwright.trace", "--run", str(options.record), "-m", module] if options.record else [module]
