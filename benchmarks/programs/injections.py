"""Causes added to a training program from outside its package: hooks on the model that it calls, nothing else."""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from common import StepClock

# torch.cuda._sleep counts cycles of the device's clock; what a second holds is measured once, on an idle device. An
# H200 at work clocks a little lower: 50 ms asked for took 52. A trace's spinning kernels say how long it really was.
CALIBRATION_CYCLES = 10**8


def spinning_cycles_per_s() -> float:
    """Cycles of torch.cuda._sleep in a second on this device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(CALIBRATION_CYCLES)
    start.record()
    torch.cuda._sleep(CALIBRATION_CYCLES)
    end.record()
    end.synchronize()
    return CALIBRATION_CYCLES / (start.elapsed_time(end) / 1e3)


def first_element(output: Any) -> Tensor:
    """One element of whatever a forward pass returned."""
    if isinstance(output, dict):
        output = next(iter(output.values()))
    while isinstance(output, tuple | list):
        output = output[0]
    local = output.to_local() if isinstance(output, DTensor) else output
    return local.detach().flatten()[0]


def inject(options: argparse.Namespace, model: nn.Module, layers: list[nn.Module], rank: int, clock: StepClock) -> None:
    """Add the causes that the options name to the module that the training loop calls.

    Call it after the model was wrapped: a hook that is put first then runs before the wrapper's own, and so before
    any operator or collective of the pass.
    """

    def chosen() -> bool:
        return not options.even_steps or clock.steps % 2 == 0

    if options.slow_ms and options.slow_rank == rank:
        slow(model, options.slow_ms / 1e3, options.slow_kernels, chosen)
    if options.item:
        model.register_forward_hook(lambda _module, _args, output: first_element(output).item() and None)
    in_first_pass = FirstPass(model, clock)
    count = options.items_per_step
    for number in range(count):
        read_in(layers[number * len(layers) // count], in_first_pass)
    if options.sleep:
        sleep_after(model, options.sleep / 1e3, in_first_pass, chosen)


def slow(model: nn.Module, seconds: float, on_device: bool, chosen: Callable[[], bool]) -> None:
    """Delay each forward pass, on the host in chosen steps, or on the device."""
    cycles = int(seconds * spinning_cycles_per_s()) if on_device else 0

    def wait(_module: nn.Module, _args: Any) -> None:
        if on_device:
            torch.cuda._sleep(cycles)
        elif chosen():
            time.sleep(seconds)

    model.register_forward_pre_hook(wait, prepend=True)


class FirstPass:
    """Whether the forward pass that runs is its step's first: what is added "each step" is added once."""

    def __init__(self, model: nn.Module, clock: StepClock) -> None:
        self._passes = 0
        clock.listeners.append(self._reset)
        model.register_forward_pre_hook(self._count)

    def _reset(self) -> None:
        self._passes = 0

    def _count(self, _module: nn.Module, _args: Any) -> None:
        self._passes += 1

    def __bool__(self) -> bool:
        return self._passes == 1


def read_in(layer: nn.Module, in_first_pass: FirstPass) -> None:
    """Read one element of the layer's output on the host, which waits for the device."""

    def read(_module: nn.Module, _args: Any, output: Any) -> None:
        if in_first_pass:
            first_element(output).item()

    layer.register_forward_hook(read)


def sleep_after(model: nn.Module, seconds: float, in_first_pass: FirstPass, chosen: Callable[[], bool]) -> None:
    """Sleep between a chosen step's first forward and backward passes, on every rank."""

    def rest(_module: nn.Module, _args: Any, _output: Any) -> None:
        if in_first_pass and chosen():
            time.sleep(seconds)

    model.register_forward_hook(rest)
