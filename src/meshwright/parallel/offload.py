"""Optimizer states in the host's memory: only one parameter's are on the device at a time, while it is updated.

Parameters in the host's memory are FSDP's own affair (parallel/shard.py), and their optimizer runs there.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from meshwright.parallel.part import local

MOMENTS = ("exp_avg", "exp_avg_sq")


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
                        self.fetch(parameter)
                        self.param_groups = [{**group, "params": [parameter]}]
                        super().step()
                        self.put_away(parameter)
        finally:
            self.param_groups = groups

    def fetch(self, parameter: Tensor) -> None:
        """Bring a parameter's moments to where its gradient is."""
        for moment in self._moments(parameter):
            set_local(moment, local(moment).to(local(parameter).device, non_blocking=True))

    def put_away(self, parameter: Tensor) -> None:
        """Take a parameter's moments to the host."""
        for moment in self._moments(parameter):
            here = local(moment)
            if here.device.type != "cpu":
                host = torch.empty_like(here, device="cpu", pin_memory=True)
                set_local(moment, host.copy_(here, non_blocking=True))

    def _moments(self, parameter: Tensor) -> list[Tensor]:
        state = self.state.get(parameter, {})
        return [state[name] for name in MOMENTS if name in state]


def set_local(tensor: Tensor, part: Tensor) -> None:
    """Put other memory, here or on the host, under a tensor of the same shape."""
    if isinstance(tensor, DTensor):
        # As FSDP does when it offloads: a DTensor's own constructor would take the part back to the mesh's devices.
        tensor._local_tensor = part
    else:
        tensor.data = part
