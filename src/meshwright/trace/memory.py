"""What one rank's memory holds at a step's peak, measured."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from meshwright.account import MemoryAccount
from meshwright.parallel import PartOptimizer, Stages
from meshwright.parallel.later import Product
from meshwright.parallel.mesh import SHARDING_AXES
from meshwright.parallel.part import local
from meshwright.record.process import peak_resident_bytes, resident_bytes
from meshwright.spec import Action, Moment, fullest_moments


class MemoryProbe:
    """Watches the steps in which it is `active`.

    On a GPU the caching allocator is asked; on a CPU, which has none, tensors saved for backward are counted.

    Order of calls: `forward` around each forward pass, `backward` after each backward pass, `passed` after the last,
    `states` when gradients and optimizer states are all there, `account` at the step's end. Of a stage's passes the
    first is watched: others are like it.
    """

    def __init__(self, device: torch.device) -> None:
        self.active = False
        self._device = device
        self._cuda = device.type == "cuda"
        # What the process holds before it has a model: libraries, the device context.
        self._baseline_bytes = 0 if self._cuda else resident_bytes()
        # Of a microbatch, in the one step that is watched: what each stage keeps between its passes, what it puts off
        # where its backward passes are cut in two, and what the loss keeps of the logits.
        self._kept: dict[int, float] = {}
        self._put_off: dict[int, float] = {}
        self._loss = 0.0
        # At the peak, of all microbatches and of the rank's stages.
        self._activations = self._logits = self._gathered = 0.0
        self._states: dict[str, float] = {}

    @contextmanager
    def forward(self, model: Stages, action: Action) -> Iterator[Callable[[Tensor], Tensor]]:
        """Around a forward pass; yields what the stage's output is to be passed through."""
        if not self.active or action.stage in self._kept:
            yield lambda made: made
            return
        sent = 0.0

        def note(made: Tensor) -> Tensor:
            nonlocal sent
            if action.stage == model.last:
                # Themselves, or uncompiled log-probabilities in fp32.
                own = local(made)
                self._loss = float(own.numel() * (own.element_size() if self._cuda else torch.float32.itemsize))
            else:
                # Kept until its gradient comes back, but not saved by any operator.
                sent = 0.0 if self._cuda else tensor_bytes([made])
            return made

        before = gathered_bytes(model)
        with self._allocator() if self._cuda else self._saved(model) as count:
            yield note
            kept = count() + sent
            self._gathered = gathered_bytes(model)
        # The allocator cannot tell parameters that stay gathered after the forward pass from activations.
        kept -= self._gathered - before if self._cuda else 0.0
        self._kept[action.stage] = max(0.0, kept - (self._loss if action.stage == model.last else 0.0))

    def backward(self, action: Action, put_off: Sequence[Product]) -> None:
        """After a backward pass, or one half of it; put_off: the products that it has left for later."""
        if self.active and put_off and action.stage not in self._put_off:
            held = (local(tensor).untyped_storage() for product in put_off for tensor in (product.x, product.gradient))
            self._put_off[action.stage] = float(sum({each.data_ptr(): each.nbytes() for each in held}.values()))

    def passed(self, actions: Sequence[Action]) -> None:
        """After the last pass; actions: all of them, in order. Finds the peak as the plan does."""
        if not self.active:
            return
        last = max(self._kept)

        def at(moment: Moment) -> tuple[float, float]:
            stages = sorted(self._kept)
            kept = sum(count * self._kept[stage] for count, stage in zip(moment.kept, stages, strict=True))
            off = sum(n * self._put_off.get(stage, 0.0) for n, stage in zip(moment.put_off, stages, strict=True))
            return kept + off, self._loss * max(0, moment.kept[stages.index(last)] - 1)

        # When a backward pass begins, the logits' gradient is there too; uncompiled, so is that of what the loss keeps.
        logits = self._loss * (2 if self._cuda else 3)
        # Of other microbatches there is what the loss keeps.
        held, others = max((at(moment) for moment in fullest_moments(actions)), key=sum)
        # Once a backward pass has put all off, this can be more than its beginning, logits and all.
        more = max((off - self._kept[stage] for stage, off in self._put_off.items()), default=0.0)
        self._activations = held + max(0.0, more - logits)
        self._logits = logits + others

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

    def states(self, model: nn.Module, optimizer: PartOptimizer) -> None:
        """Count parameters, gradients and optimizer states, exactly, while all of them are there."""
        if not self.active:
            return
        states = (value for parameter in model.parameters() for value in optimizer.states(parameter).values())
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
    return not SHARDING_AXES.isdisjoint(axes or ())
