"""What any program's memory holds, as far as it can be told from outside."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from meshwright.account import MemoryAccount
from meshwright.trace.memory import peak_resident_bytes, resident_bytes, tensor_bytes


class Holdings:
    """Watches one step: `open` at its begin, `close` at its end.

    Parameters, gradients and optimizer states are this rank's own parts, exactly; gradients are read when the optimizer
    is about to step, since many programs drop them before the step ends.
    """

    def __init__(self, models: Sequence[nn.Module], optimizers: Sequence[Optimizer], device: torch.device) -> None:
        self._models = models
        self._optimizers = optimizers
        self._device = device
        self._cuda = device.type == "cuda"
        self._baseline_bytes = resident_bytes()
        self._gradients = 0.0
        self._hook: Any = None

    def parameters(self) -> list[Tensor]:
        """Of the models, or where none is known, those that the optimizers move."""
        if self._models:
            found = [p for model in self._models for p in model.parameters()]
        else:
            found = [p for optimizer in self._optimizers for group in optimizer.param_groups for p in group["params"]]
        return list({id(p): p for p in found}.values())

    def _here(self, tensors: Iterable[Tensor]) -> float:
        return tensor_bytes(tensor for tensor in tensors if tensor.device.type == self._device.type)

    def open(self) -> None:
        """The step begins."""
        self._gradients = 0.0

        def count(*_: Any) -> None:
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            self._gradients = max(self._gradients, self._here(gradients))

        self._hook = register_optimizer_step_pre_hook(count)

    def drop(self) -> None:
        """No longer watch."""
        hook, self._hook = self._hook, None
        if hook is not None:
            hook.remove()

    def close(self) -> MemoryAccount:
        """The step has ended: its account.

        What the peak holds beyond what is counted stands under `activations`: logits and buffers are among it. On a GPU
        the peak is the process's so far, as its allocator knows it without being reset, which the program may rely on;
        on a CPU it is the resident set's, and `framework` what was resident before the first step but the parameters.
        """
        self.drop()
        parameters = self._here(self.parameters())
        states = self._here(
            value
            for optimizer in self._optimizers
            for state in optimizer.state.values()
            for value in (state.values() if isinstance(state, dict) else ())
            if isinstance(value, Tensor)
        )
        known = parameters + self._gradients + states
        if self._cuda:
            free, whole = torch.cuda.mem_get_info(self._device)
            peak = float(torch.cuda.max_memory_allocated(self._device))
            fragmentation = torch.cuda.max_memory_reserved(self._device) - peak
            framework = max(0.0, whole - free - torch.cuda.memory_reserved(self._device))
        else:
            framework = max(0.0, self._baseline_bytes - parameters)
            peak = peak_resident_bytes() - framework
            fragmentation = 0.0
        return MemoryAccount(
            parameters=parameters,
            gradients=self._gradients,
            optimizer_states=states,
            activations=max(0.0, peak - known),
            framework=framework,
            fragmentation=fragmentation,
        )
