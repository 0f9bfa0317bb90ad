"""Loops that are not ours, small ones, and their records read back."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from meshwright.record import Event, Fault, Program, RunFolder, Span, open_run, read_events, read_metrics, read_program

WIDTH, ROWS = 16, 8


def build(blocks: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH)) for _ in range(blocks)))


def batches(count: int, workers: int = 0) -> DataLoader[Tensor]:
    return DataLoader(torch.ones(count * ROWS, WIDTH), ROWS, num_workers=workers)  # pyright: ignore[reportArgumentType]


def update(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> Tensor:
    loss = model(batch).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def step_flops() -> int:
    """Of one process; what a loop's first product needs no gradient of its input for is not run."""
    model = build()
    with FlopCounterMode(display=False) as counter:
        model(torch.ones(ROWS, WIDTH)).square().mean().backward()
    return counter.get_total_flops()


class Read:
    """A run, read back."""

    def __init__(self, path: Path, attempt: int = 0) -> None:
        self.folder: RunFolder = open_run(path)
        program = read_program(self.folder)
        assert program is not None
        self.program: Program = program
        self.ranks: dict[int, list[Event]] = read_events(self.folder, attempt)
        self.metrics = read_metrics(self.folder)[0]

    def of(self, kind: type[Any], rank: int = 0) -> list[Any]:
        return [line for line in self.ranks[rank] if isinstance(line, kind)]

    def spans(self, name: str, rank: int = 0) -> list[Span]:
        return [span for span in self.of(Span, rank) if span.name == name]

    def faults(self) -> list[str]:
        return [fault.what for rank in self.ranks for fault in self.of(Fault, rank)]
