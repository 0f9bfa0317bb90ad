"""Where Meshwright is attached to a program: the only lines of this folder that know it."""

import argparse
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer

from meshwright.trace import Recording, record
from meshwright.trace.huggingface import RecordCallback


class NotRecorded:
    """What a loop without --record iterates through."""

    def steps(self, loader: Iterable[Any], *, microbatches: int = 1) -> Iterator[Any]:
        """The loader's batches."""
        del microbatches
        return iter(loader)

    def close(self) -> None:
        """Nothing was opened."""


def recorder_of(options: argparse.Namespace, model: nn.Module, optimizer: Optimizer) -> Recording | NotRecorded:
    """The recorder of a loop of one's own."""
    return record(options.record, model, optimizer, **sampling(options)) if options.record else NotRecorded()


def callbacks_of(options: argparse.Namespace) -> list[Any]:
    """The callbacks that record a Hugging Face Trainer."""
    return [RecordCallback(options.record, **sampling(options))] if options.record else []


def wrapped(options: argparse.Namespace, module: str) -> list[str]:
    """The words after `python -m` that run a module unchanged, recorded if the options say so."""
    if not options.record:
        return [module]
    chosen = [word for key, value in sampling(options).items() for word in spelt(key, value)]
    return ["meshwright.trace", "--record", str(options.record), *chosen, "-m", module]


def spelt(key: str, value: Any) -> list[str]:
    """An option of record() as the wrapper's command line has it."""
    option = f"--{key.replace('_', '-')}"
    return [option] if value is True else [option, str(value)]


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    """How often steps are sampled, where the options say so; traces are kept for whoever checks the account."""
    found: dict[str, Any] = {}
    if options.every_steps is not None:
        found["every_steps"] = options.every_steps
    if options.keep_traces:
        found["keep_traces"] = True
    return found
