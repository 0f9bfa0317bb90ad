"""Updates of parameters, which need no other rank."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from meshwright.parallel.part import local

MOMENTS = ("exp_avg", "exp_avg_sq")


class PartOptimizer:
    """A torch optimizer of this rank's parts of some parameters.

    The optimizers here change each element by itself, so a rank needs its own part of a parameter, of its gradient and
    of its states, and not how they are spread. Given DTensors instead, torch works that out anew for each operation and
    each set of parameters: with two axes more time than the first steps of a small model take.
    """

    def __init__(self, kind: type[Optimizer], groups: Iterable[Mapping[str, Any]], **settings: Any) -> None:
        """groups: as torch's optimizers take them, of the model's own parameters; settings: for all of them."""
        self._parts: dict[nn.Parameter, nn.Parameter] = {}
        own: list[dict[str, Any]] = []
        for group in groups:
            parts = {parameter: nn.Parameter(local(parameter).detach()) for parameter in group["params"]}
            self._parts |= parts
            own.append({**group, "params": list(parts.values())})
        self._optimizer = kind(own, **settings)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The groups' settings, which may be changed between steps."""
        return self._optimizer.param_groups

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for parameter, part in self._parts.items():
            # FSDP moves a parameter to other memory when it is first used.
            part.data = local(parameter).detach()
            part.grad = None if parameter.grad is None else local(parameter.grad)
        self._optimizer.step()

    def free_gradients(self) -> None:
        """Let go of them."""
        for parameter, part in self._parts.items():
            parameter.grad = part.grad = None

    def states(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What is kept for a parameter, by name: of this rank's part, or one number."""
        return self._optimizer.state.get(self._parts[parameter], {})

    def set_state(self, parameter: nn.Parameter, name: str, value: Tensor) -> None:
        """Take over a state that was saved."""
        self._optimizer.state[self._parts[parameter]][name] = value


class HostAdamW(AdamW):
    """AdamW whose moments stay in pinned memory of the host between steps.

    A step brings each parameter's moments to the device, updates the parameter there and takes them back: 16 bytes a
    parameter over the host's link.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update one parameter after the other; closure: not used."""
        assert closure is None
        groups = self.param_groups
        try:
            for group in groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(group, parameter)
        finally:
            self.param_groups = groups

    def _update(self, group: dict[str, Any], parameter: Tensor) -> None:
        state = self.state[parameter]
        host = {name: state[name] for name in MOMENTS if name in state}
        state.update({name: moment.to(parameter.device, non_blocking=True) for name, moment in host.items()})
        self.param_groups = [{**group, "params": [parameter]}]
        super().step()
        for name in MOMENTS:
            # The same memory in each step: pinning some more takes longer than the update.
            kept = host.get(name)
            if kept is None or kept.device.type != "cpu":
                kept = torch.empty_like(state[name], device="cpu", pin_memory=parameter.is_cuda)
            state[name] = kept.copy_(state[name], non_blocking=True)
