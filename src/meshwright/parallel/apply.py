"""The one order in which a layout is applied to a model, Meshwright's own or any other.

    1. build the model on the meta device: shapes only, no memory (its builder does; a small model may have values)
    2. split its modules along tensor
    3. say what its blocks compute again, and compile them, one by one (GPU)
    4. split and replicate parameters over shard and replica
    5. allocate this rank's part and fill it with initial weights that do not depend on the layout

Pipeline, context and expert come between 1 and 3 when they are built: they change what a block computes; recompute,
compilation and sharding do not.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from meshwright.models import Decoder, build_model, initial_tensor, token_loss
from meshwright.parallel.part import copy_whole
from meshwright.parallel.recompute import block_forward
from meshwright.parallel.shard import apply_shard
from meshwright.parallel.tensor import Heads, Loss, apply_tensor, build_vocabulary_loss, overlap_transfers
from meshwright.parallel.units import check_table, check_units, find_tail, find_units
from meshwright.spec import SPLIT_TABLES, Job, Layout, SettingError, SplitTable

Model = TypeVar("Model", bound=nn.Module)
# The whole tensor of a name and a shape, the same on every rank.
Initialize = Callable[[str, tuple[int, ...]], Tensor]


def build_parallel_model(job: Job, mesh: DeviceMesh, device: torch.device) -> Decoder:
    """The job's model as this rank holds it, on `device`, with initial weights.

    Tensors of `named_parameters` are DTensors, whole in shape and local in memory.
    """

    def initialize(name: str, shape: tuple[int, ...]) -> Tensor:
        return initial_tensor(name, shape, job.model, job.run.seed, device)

    return parallelize(
        build_model(job.model, device="meta"),
        job.layout,
        mesh,
        blocks=("blocks.*",),
        # A tied head's weight is the embedding's, gathered with it.
        tail=() if job.model.tied_embeddings else ("norm", "head"),
        table=SPLIT_TABLES[job.model.family],
        kv_heads=job.model.kv_heads,
        head_dim=job.model.head_dim,
        random=False,
        initialize=initialize,
    )


def parallelize(
    model: Model,
    layout: Layout,
    mesh: DeviceMesh,
    *,
    blocks: Sequence[str],
    tail: Sequence[str] = (),
    table: SplitTable | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    random: bool = True,
    initialize: Initialize | None = None,
) -> Model:
    """Apply a layout to any model in place, and return it on this rank's device. Raises SettingError.

    blocks: patterns of the modules that are gathered, computed again and compiled one by one.
    tail: modules that run last in the forward pass, gathered as one and kept until the backward pass.
    table: how modules are split along tensor; kv_heads and head_dim where its words have "kv_heads".
    random: blocks draw random numbers (dropout), so computing them again must repeat the draw.
    initialize: fills a model built on the meta device. Without, the model has values, the same on every rank.
    """
    units = find_units(model, blocks)
    last = find_tail(model, tail, units)
    check_units(model, layout, mesh, units, last)
    empty = needs_values(model, initialize)
    if layout.tensor > 1:
        heads = None if kv_heads is None or head_dim is None else Heads(kv_heads, head_dim)
        check_table(model, table, layout.tensor, heads)
        apply_tensor(model, table or {}, mesh["tensor"], heads)
    if layout.async_tensor:
        overlap_transfers()
    compiled = mesh.device_type == "cuda"
    for index, unit in enumerate(units):
        unit.forward = block_forward(unit.forward, layout, index, compiled=compiled, random=random)
    apply_shard(model, mesh, layout, units, last)
    if empty and initialize is not None:
        model.to_empty(device=mesh.device_type)
        fill(model, initialize)
    return model


def needs_values(model: nn.Module, initialize: Initialize | None) -> bool:
    """Whether the model is on the meta device. Raises SettingError where it would be left unfilled, or filled twice."""
    on_meta = {name for name, tensor in chain(model.named_parameters(), model.named_buffers()) if tensor.is_meta}
    with_values = {name for name, tensor in chain(model.named_parameters(), model.named_buffers())} - on_meta
    if on_meta and with_values:
        reason = f"has values, but {min(on_meta)} is on the meta device"
        raise SettingError(f"model, whose {min(with_values)}", reason, 'all built under torch.device("meta")')
    if on_meta and initialize is None:
        raise SettingError("initialize = None", "the model is on the meta device and has no values", "initialize=...")
    if with_values and initialize is not None:
        raise SettingError("initialize", "the model has values already", "initialize = None, or the meta device")
    return bool(on_meta)


def build_loss(job: Job, mesh: DeviceMesh, device: torch.device) -> Loss:
    """The loss of the logits that the model gives on this rank, summed over counted targets."""
    return build_token_loss(job.model.vocabulary, job.layout, mesh, compiled=device.type == "cuda")


def build_token_loss(vocabulary: int, layout: Layout, mesh: DeviceMesh, *, compiled: bool = False) -> Loss:
    """Cross entropy summed over counted targets, of whole logits or of what the word "logits" makes along tensor.

    Compiled on a GPU, where its fp32 copies of the logits would otherwise be the largest tensors.
    """
    if layout.tensor > 1:
        return build_vocabulary_loss(vocabulary, mesh["tensor"], compiled=compiled)
    return torch.compile(token_loss) if compiled else token_loss


@torch.no_grad()
def fill(model: nn.Module, initialize: Initialize) -> None:
    """Fill every parameter and buffer; each rank makes the whole tensor and keeps its part.

    One tensor at a time, so the extra memory is one parameter's; no rank needs another, so nothing is sent.
    """
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        copy_whole(tensor, initialize(name, tuple(tensor.shape)))
