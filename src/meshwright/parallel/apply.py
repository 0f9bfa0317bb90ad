"""The one order in which a layout is applied to a model.

    1. build the model on the meta device: shapes only, no memory
    2. compile its blocks, one by one (GPU)
    3. split and replicate parameters over shard and replica
    4. allocate this rank's part and fill it with the layout-independent initial weights

Pipeline, tensor, context and expert come between 1 and 2 when they are built: they change what a block computes,
compilation and sharding do not.
"""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from meshwright.models import Decoder, build_model, initial_tensor
from meshwright.parallel.shard import apply_shard
from meshwright.spec import Job


def build_parallel_model(job: Job, mesh: DeviceMesh, device: torch.device) -> Decoder:
    """The job's model as this rank holds it, on `device`, with initial weights.

    Tensors of `named_parameters` are DTensors, whole in shape and local in memory.
    """
    model = build_model(job.model, device="meta")
    if device.type == "cuda":
        for block in model.blocks:
            block.compile()
    apply_shard(model, mesh, job.layout)
    model.to_empty(device=device)
    fill_initial(model, job, device)
    return model


@torch.no_grad()
def fill_initial(model: nn.Module, job: Job, device: torch.device) -> None:
    """Fill every parameter from its name and the seed; each rank makes the whole tensor and keeps its part.

    One tensor at a time, so the extra memory is one parameter's; no rank needs another, so nothing is sent.
    """
    for name, parameter in model.named_parameters():
        whole = initial_tensor(name, tuple(parameter.shape), job.model, job.run.seed, device)
        copy_whole(parameter, whole)


def copy_whole(parameter: torch.Tensor, whole: torch.Tensor) -> None:
    """Copy this rank's part of a whole tensor, known to every rank, into a parameter."""
    if isinstance(parameter, DTensor):
        # src_data_rank=None: every rank holds the same `whole` already, so only slice it.
        part = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(part.to_local())
    else:
        parameter.copy_(whole)
