"""What one rank's memory holds at a step's peak, measured."""

import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from meshwright.account import MemoryAccount
from meshwright.parallel.part import local


class MemoryProbe:
    """Watches the steps in which it is `active`.

    On a GPU the caching allocator is asked; on a CPU, which has none, tensors saved for backward are counted.

    Order of calls: `forward` around the first microbatch's forward pass, `states` when gradients and optimizer
    states are all there, `account` at the step's end.
    """

    def __init__(self, device: torch.device) -> None:
        self.active = False
        self._device = device
        self._cuda = device.type == "cuda"
        # What the process holds before it has a model: libraries, the device context.
        self._baseline_bytes = 0 if self._cuda else resident_bytes()
        # Sums over a rank's stages, in the one step that is watched.
        self._activations = self._logits = self._gathered = 0.0
        self._states: dict[str, float] = {}

    @contextmanager
    def forward(self, model: nn.Module, *, times: int) -> Iterator[Callable[[Tensor], Tensor]]:
        """Around a forward pass; yields what logits are to be passed through, if it ends in them.

        times: how many alike are kept at once at the step's peak; 0: not watched, because one like it was.
        """
        if not (self.active and times):
            yield lambda logits: logits
            return
        held = self._allocator() if self._cuda else self._saved(model)
        with held as count:
            seen: list[float] = []
            yield partial(self._note, seen)
            kept = count()
            self._gathered = gathered_bytes(model)
        # The allocator cannot tell parameters that stay gathered after the forward pass from activations.
        kept -= self._gathered if self._cuda else 0.0
        self._activations += times * max(0.0, kept - sum(seen))
        # When a backward pass begins, the gradient is there too; uncompiled, so is that of what the loss has kept. Of
        # other microbatches whose logits wait there is what the loss keeps.
        self._logits += (times + (1 if self._cuda else 2)) * sum(seen)

    def _note(self, seen: list[float], logits: Tensor) -> Tensor:
        """Remember how much the loss keeps of these logits: themselves, or uncompiled log-probabilities in fp32."""
        kept = local(logits)
        seen.append(float(kept.numel() * (kept.element_size() if self._cuda else torch.float32.itemsize)))
        return logits

    @contextmanager
    def _allocator(self) -> Iterator[Callable[[], float]]:
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        yield lambda: float(torch.cuda.memory_allocated(self._device) - before)

    @contextmanager
    def _saved(self, model: nn.Module) -> Iterator[Callable[[], float]]:
        """Bytes of the distinct tensors that autograd keeps for the backward pass, parameters left out."""
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = local(tensor).untyped_storage()
            # A parameter is known by its memory: a view of one is no parameter, and not of one that is split.
            if storage.data_ptr() not in {local(p).untyped_storage().data_ptr() for p in model.parameters()}:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield lambda: float(sum(seen.values()))

    def states(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Count parameters, gradients and optimizer states, exactly, while all of them are there."""
        if not self.active:
            return
        states = (v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor))
        found = {
            "parameters": model.parameters(),
            "gradients": (p.grad for p in model.parameters() if p.grad is not None),
            "optimizer_states": states,
        }
        # What is offloaded lies in the host's memory, not in this account.
        kind = "cuda" if self._cuda else "cpu"
        self._states = {
            name: tensor_bytes(tensor for tensor in tensors if local(tensor).device.type == kind)
            for name, tensors in found.items()
        }

    def account(self) -> MemoryAccount:
        """The account of the step watched; what the peak holds beyond the parts counted is transfer buffers."""
        known = sum(self._states.values()) + self._activations + self._logits
        if self._cuda:
            free, whole = torch.cuda.mem_get_info(self._device)
            peak = float(torch.cuda.max_memory_allocated(self._device))
            reserved = float(torch.cuda.max_memory_reserved(self._device))
            framework = whole - free - torch.cuda.memory_reserved(self._device)
        else:
            peak = known + self._gathered
            reserved = max(peak, peak_resident_bytes() - self._baseline_bytes)
            framework = self._baseline_bytes
        return MemoryAccount(
            **self._states,
            activations=self._activations,
            logits=self._logits,
            communication_buffers=max(0.0, peak - known),
            framework=framework,
            fragmentation=max(0.0, reserved - max(peak, known)),
        )


def tensor_bytes(tensors: Any) -> float:
    """Bytes of this rank's part of some tensors."""
    parts = (local(tensor) for tensor in tensors)
    return float(sum(part.numel() * part.element_size() for part in parts))


def resident_bytes() -> float:
    """This process's resident set now, in bytes; its peak where the system does not say."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
        return float(pages) * resource.getpagesize()
    except OSError:
        return peak_resident_bytes()


def peak_resident_bytes() -> float:
    """The largest resident set of this process so far, in bytes."""
    # Not getrusage where Linux says it better: that figure survives exec, so a child starts with its parent's peak.
    try:
        peak = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        peak = None
    if peak:
        return float(peak[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def peak_memory_bytes(device: torch.device) -> float:
    """The most memory this rank has taken so far: reserved on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_reserved(device))
    return peak_resident_bytes()


def gathered_bytes(model: nn.Module) -> float:
    """Bytes of parameters that are gathered now: FSDP puts them in the place of the sharded ones, without its axis."""
    return tensor_bytes(p for p in model.parameters() if not is_sharded(p))


def is_sharded(parameter: Tensor) -> bool:
    """Whether a parameter is a rank's part along FSDP's axes."""
    axes = parameter.device_mesh.mesh_dim_names if isinstance(parameter, DTensor) else ()
    return not {"shard", "expert_shard"}.isdisjoint(axes or ())
