"""The one order in which a layout is applied to a model, Meshwright's own or any other.

    1. build the model on the meta device: shapes only, no memory (its builder does; a small model may have values);
       along pipeline only the stages that this rank holds, each of which goes through what follows by itself
    2. let its attention reach over the ranks of context
    3. divide its mixtures' experts along expert, and say how tokens come to them
    4. have matrices put off their weights' gradients, where the schedule cuts backward passes in two
    5. split modules along tensor
    6. say what blocks compute again, and compile them, one by one (GPU)
    7. split and replicate parameters over shard x context and replica, experts over the ranks that expert leaves
    8. allocate this rank's part and fill it with initial weights that do not depend on the layout

What changes the numbers that a block computes with, or where they are, comes before 6; what follows does not.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from meshwright.models import Decoder, build_model, initial_tensor, token_loss
from meshwright.parallel.context import apply_context
from meshwright.parallel.expert import ExpertAxis, apply_expert, build_expert_axis, shard_experts
from meshwright.parallel.later import Later, put_products_off
from meshwright.parallel.part import copy_whole
from meshwright.parallel.pipeline import Stages, build_pipe
from meshwright.parallel.recompute import prepare_block
from meshwright.parallel.shard import apply_shard, begins_stage
from meshwright.parallel.tensor import Heads, Loss, apply_tensor, build_vocabulary_loss, overlap_transfers
from meshwright.parallel.units import check_table, check_units, find_tail, find_units
from meshwright.spec import (
    SPLIT_BACKWARD,
    Job,
    Layout,
    SettingError,
    SplitTable,
    held_stages,
    split_table,
    stage_blocks,
)

Model = TypeVar("Model", bound=nn.Module)
# The whole tensor of a name and a shape, the same on every rank.
Initialize = Callable[[str, tuple[int, ...]], Tensor]


def build_parallel_model(job: Job, mesh: DeviceMesh, device: torch.device) -> Stages:
    """The job's model as this rank holds it, on `device`, with initial weights.

    Tensors of `named_parameters` are DTensors, whole in shape and local in memory.
    """
    layout, spec = job.layout, job.model
    blocks = stage_blocks(spec, layout, job.data.sequence)
    pipe = build_pipe(job, mesh, device)
    axis = build_expert_axis(layout, mesh, job.data.global_batch) if spec.experts else None
    parts: dict[int, Decoder] = {}
    later: dict[int, Later] = {}
    for stage in held_stages(layout, pipe.rank):
        held = blocks[stage]
        part = build_model(spec, "meta", held.start, held.stop)
        if layout.context > 1:
            window = spec.attention_window if spec.attention_window < job.data.sequence else 0
            apply_context(part, layout, mesh["context"], window)
        if axis is not None:
            apply_expert(part, axis)
        if layout.schedule in SPLIT_BACKWARD:
            later[stage] = Later()
            put_products_off(part, later[stage])
        units = list(part.blocks.values())
        tail = [] if part.norm is None or part.head is None or part.head.weight is None else [part.norm, part.head]
        heads = Heads(spec.kv_heads, spec.head_dim)
        apply_layout(part, layout, mesh, units, tail, split_table(spec), heads, first=held.start, expert_axis=axis)
        if stage:
            begins_stage(units[0])
        allocate(part, layout, device)
        parts[stage] = part
    model = Stages(spec, layout, mesh, pipe, parts, later)
    fill(model, lambda name, shape: initial_tensor(name, shape, spec, job.run.seed, device))
    return model


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
    heads = None if kv_heads is None or head_dim is None else Heads(kv_heads, head_dim)
    if layout.tensor > 1:
        check_table(model, table, layout.tensor, heads)
    apply_layout(model, layout, mesh, units, last, table or {}, heads, random=random)
    if empty and initialize is not None:
        model.to_empty(device=mesh.device_type)
        fill(model, initialize)
    return model


def apply_layout(
    model: nn.Module,
    layout: Layout,
    mesh: DeviceMesh,
    units: Sequence[nn.Module],
    tail: Sequence[nn.Module],
    table: SplitTable,
    heads: Heads | None,
    *,
    first: int = 0,
    random: bool = False,
    expert_axis: ExpertAxis | None = None,
) -> None:
    """Split, compile and shard a model, or a pipeline's stage of one, whose first unit is the whole model's `first`.

    expert_axis: what the experts of a model with mixtures are divided over.
    """
    if layout.tensor > 1:
        apply_tensor(model, table, mesh["tensor"], heads)
    if layout.async_tensor:
        overlap_transfers()
    # A compiled block's backward pass is one piece: there is no putting a part of it off.
    compiled = mesh.device_type == "cuda" and layout.schedule not in SPLIT_BACKWARD
    for index, unit in enumerate(units, first):
        prepare_block(unit, layout, index, compiled=compiled, random=random)
    if expert_axis is not None:
        shard_experts(model, layout, expert_axis)
    apply_shard(model, mesh, layout, units, tail)


def allocate(part: nn.Module, layout: Layout, device: torch.device) -> None:
    """Give a part of a model memory, unfilled: parameters where the layout has them, buffers where they are used."""
    part.to_empty(device="cpu" if layout.offload == "parameters" else device)
    for module in part.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer.to(device))


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
