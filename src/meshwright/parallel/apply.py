"""The one order in which a layout is applied to a model.

    1. build the model on the meta device: shapes only, no memory
    2. split its modules along tensor
    3. say what its blocks compute again, and compile them, one by one (GPU)
    4. split and replicate parameters over shard and replica
    5. allocate this rank's part and fill it with the layout-independent initial weights

Pipeline, context and expert come between 1 and 3 when they are built: they change what a block computes; recompute,
compilation and sharding do not.
"""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from meshwright.models import Decoder, build_model, initial_tensor, token_loss
from meshwright.parallel.part import copy_whole
from meshwright.parallel.recompute import block_forward
from meshwright.parallel.shard import apply_shard
from meshwright.parallel.tensor import Loss, apply_tensor, build_vocabulary_loss, overlap_transfers
from meshwright.spec import SPLIT_TABLES, Job


def build_parallel_model(job: Job, mesh: DeviceMesh, device: torch.device) -> Decoder:
    """The job's model as this rank holds it, on `device`, with initial weights.

    Tensors of `named_parameters` are DTensors, whole in shape and local in memory.
    """
    model = build_model(job.model, device="meta")
    if job.layout.tensor > 1:
        apply_tensor(model, job.model, SPLIT_TABLES[job.model.family], mesh["tensor"])
    if job.layout.async_tensor:
        overlap_transfers()
    for index, block in enumerate(model.blocks):
        block.forward = block_forward(block.forward, job.layout, index, compiled=device.type == "cuda")
    apply_shard(model, mesh, job.layout)
    model.to_empty(device=device)
    fill_initial(model, job, device)
    return model


def build_loss(job: Job, mesh: DeviceMesh, device: torch.device) -> Loss:
    """The loss of the logits that the model gives on this rank, summed over counted targets.

    Compiled on a GPU, where its fp32 copies of the logits would otherwise be the largest tensors.
    """
    compiled = device.type == "cuda"
    if job.layout.tensor > 1:
        return build_vocabulary_loss(job.model, mesh["tensor"], compiled=compiled)
    return torch.compile(token_loss) if compiled else token_loss


@torch.no_grad()
def fill_initial(model: nn.Module, job: Job, device: torch.device) -> None:
    """Fill every parameter from its name and the seed; each rank makes the whole tensor and keeps its part.

    One tensor at a time, so the extra memory is one parameter's; no rank needs another, so nothing is sent.
    """
    for name, parameter in model.named_parameters():
        whole = initial_tensor(name, tuple(parameter.shape), job.model, job.run.seed, device)
        copy_whole(parameter, whole)
