"""The replica and shard axes: FSDP2 over a two-dimensional mesh.

Parameters are split along `shard` and `context`, taken as one, and copied along `replica`. Ranks along context work on
other tokens of the same samples: to FSDP that is other data, as along shard.

With both 1 nothing is split and only the gradient all-reduce of plain data parallelism remains; with all sizes 1
there is no communication at all. It is one code path for all of them.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from meshwright.models import Experts
from meshwright.parallel.mesh import sharding_plane
from meshwright.spec import SPLIT_BACKWARD, Layout

COMPUTE_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}


def apply_shard(
    model: nn.Module, mesh: DeviceMesh, layout: Layout, units: Sequence[nn.Module], tail: Sequence[nn.Module] = ()
) -> None:
    """Split `model`'s parameters in place, one group of transfers a unit, one for `tail`, one for the rest.

    Parameters and optimizer states are fp32, gradients are summed in fp32; what is gathered and computed with is
    `layout.precision`. zero 3 frees a block's gathered parameters after its forward pass and gathers them again in
    the backward pass; zero 2 and 1 keep them in between.
    """
    policy = build_policy(layout)
    # Along an axis of size 1 nothing is sent, not even to oneself.
    plane = sharding_plane(mesh, layout)
    keep = layout.zero < 3
    offload = build_offload(layout)
    for unit in units:
        fully_shard(unit, mesh=plane, mp_policy=policy, offload_policy=offload, reshard_after_forward=not keep)
    if tail:
        # Gathered last in the forward pass and needed first in the backward pass: freeing it between saves nothing.
        fully_shard(list(tail), mesh=plane, mp_policy=policy, offload_policy=offload, reshard_after_forward=False)
    fully_shard(model, mesh=plane, mp_policy=policy, offload_policy=offload, reshard_after_forward=not keep)
    if plane.size() > 1:
        for module in model.modules():
            if isinstance(module, FSDPModule) and not isinstance(module, Experts):
                sum_gradients(module)


def build_policy(layout: Layout) -> MixedPrecisionPolicy:
    """What is gathered and computed with, and what gradients are summed in."""
    # Inputs are not cast: a block is given its rotary tables in fp32 on purpose, and activations are cast already.
    return MixedPrecisionPolicy(
        param_dtype=COMPUTE_DTYPE[layout.precision], reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def build_offload(layout: Layout) -> OffloadPolicy:
    """Where parameters, gradients and optimizer states lie between their uses."""
    return CPUOffloadPolicy() if layout.offload == "parameters" else OffloadPolicy()


def sum_gradients(module: FSDPModule) -> None:
    """Gradients are summed, not averaged: the loss is already divided by the global batch's tokens."""
    # gloo has no scaled sum; asking for a plain sum makes both backends do the same.
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)


def begins_stage(unit: nn.Module) -> None:
    """Say that a unit is the first of a pipeline's later stage: no parameters are needed after its backward pass.

    FSDP gathers ahead what came before in its record of forward passes, which goes back over all since the step began:
    for this unit that is the end of the microbatch before, gathered for nothing.
    """
    # A mixture's experts come before the rest of their block in that record.
    first = next((inner for inner in unit.modules() if isinstance(inner, Experts)), unit)
    assert isinstance(first, FSDPModule)
    # Itself, which is there: an empty list stands for FSDP's own choice.
    first.set_modules_to_backward_prefetch([first])


def begin_microbatch(model: nn.Module, layout: Layout, *, last: bool) -> None:
    """Say whether the coming backward pass is the step's last, and so which reductions it runs.

    zero 3 and 2 reduce along `shard` and `context` in every microbatch and along `replica` in the last; zero 1, and
    replicas alone, keep whole gradients and reduce in the last microbatch only. So do backward passes cut in two.
    """
    assert isinstance(model, FSDPModule)
    model.set_is_last_backward(last)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # A mixture's experts may be split where the rest is not, and the other way round.
            shards = layout.expert_shard if isinstance(module, Experts) else layout.parameter_shards
            if layout.zero == 1 or shards == 1 or layout.schedule in SPLIT_BACKWARD:
                module.set_requires_gradient_sync(last, recurse=False)
                module.set_reshard_after_backward(last, recurse=False)
            else:
                module.set_requires_all_reduce(last, recurse=False)


def reduce_gradients(model: nn.Module) -> None:
    """Reduce what backward passes have gathered that ended before their weights' gradients were there."""
    assert isinstance(model, FSDPModule)
    model.set_is_last_backward(True)
    model.set_requires_gradient_sync(True)
    model.set_reshard_after_backward(True)
    # What FSDP does at the end of a last backward pass: reduce each group that has not been, and wait for all.
    fully_shard.state(model)._root_post_backward_final_callback()  # pyright: ignore[reportFunctionMemberAccess]


def free_gathered(model: nn.Module) -> None:
    """Free parameters that a forward pass without a backward pass left gathered.

    Until then `parameters()` would give the gathered copies, not the parts that the optimizer updates.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
