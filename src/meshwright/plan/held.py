"""State bytes that any one rank holds, to the byte: also of ranks that hold less than the fullest."""

from math import prod

from meshwright.account import MemoryAccount
from meshwright.plan.kept import BYTES
from meshwright.plan.part import ROUTED, STATE_BYTES, Groups, build_stages, split_dim
from meshwright.spec import (
    Axis,
    Job,
    ModelSpec,
    block_shapes,
    end_shapes,
    expert_dim,
    held_stages,
    split_table,
)


def predict_states(job: Job, rank: int) -> MemoryAccount:
    """Parameters, gradients and optimizer states of one rank of the world, in bytes; nothing else is filled in."""
    places = job.layout.coordinates(rank)
    stages = build_stages(job)
    held = tensors = 0
    for stage in (stages[index] for index in held_stages(job.layout, places["pipeline"])):
        for name, shape in stage_shapes(job.model, stage.start, stage.stop, pipeline=job.layout.pipeline).items():
            held += prod(local_shape(job, places, name, shape))
            tensors += 1
    return state_bytes(job, held, tensors)


def state_bytes(job: Job, held: int, tensors: int) -> MemoryAccount:
    """Bytes on the device of a rank's `held` parameters (elements), in so many tensors, and of what belongs to them."""
    if job.layout.offload == "parameters":
        return MemoryAccount()
    # Two moments, and a step count a parameter tensor, which stays on the device.
    moments = 0 if job.layout.offload == "optimizer" else 2 * STATE_BYTES * held
    states = moments + 4 * tensors if job.optimizer.name == "adamw" else 0
    return MemoryAccount(parameters=STATE_BYTES * held, gradients=STATE_BYTES * held, optimizer_states=states)


def whole_bytes(job: Job, groups: Groups) -> MemoryAccount:
    """The same of a program that keeps parameters whole in compute precision: with gradients as whole, and masters
    and moments in fp32 that ranks divide."""
    whole = groups.whole()
    moments = 2 if job.optimizer.name == "adamw" else 0
    return MemoryAccount(
        parameters=float(BYTES[job.layout.precision] * whole),
        gradients=float(job.trainer.gradient_bytes * whole),
        optimizer_states=(1 + moments) * STATE_BYTES * divided_elements(job, groups),
    )


def divided_elements(job: Job, groups: Groups) -> float:
    """Parameters that a rank's optimizer updates: of a flat row of numbers, cut evenly wherever a parameter ends."""
    plain, routed = groups.whole() - groups.routed, groups.routed
    if not job.trainer.splits_states:
        return plain + routed
    return plain / job.layout.parameter_shards + routed / job.layout.expert_shard


def stage_shapes(model: ModelSpec, start: int, stop: int, *, pipeline: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of each parameter of a stage of blocks `start` to `stop`."""
    before, after = end_shapes(model)
    shapes = dict(before) if start == 0 else {}
    for layer in range(start, stop):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block_shapes(model, layer).items()}
    if stop == model.layers:
        shapes |= after
        if model.tied_embeddings and pipeline > 1:
            shapes["head.weight"] = before["embedding.weight"]
    return shapes


def local_shape(job: Job, places: dict[Axis, int], name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """What the rank at `places` holds of a parameter."""
    layout = job.layout
    # Ranks are counted along shard, context and tensor, the last one fastest.
    along = (places["shard"] * layout.context + places["context"]) * layout.tensor + places["tensor"]
    if name.partition(".")[2].partition(".")[2].startswith(ROUTED):
        expert_place, shard_place = along % layout.expert, along // layout.expert
        shape = chunk(shape, 0, layout.expert, expert_place)
        return chunk(shape, expert_dim(shape[1], layout.expert_shard), layout.expert_shard, shard_place)
    dim = split_dim(job.model, split_table(job.model), name, shape, layout.tensor)
    if dim is not None:
        shape = chunk(shape, dim, layout.tensor, places["tensor"])
    return chunk(shape, 0, layout.parameter_shards, along // layout.tensor)


def chunk(shape: tuple[int, ...], dim: int, parts: int, place: int) -> tuple[int, ...]:
    """One of the pieces that torch.chunk makes: all as long as the first, rounded up, while it lasts."""
    length = -(-shape[dim] // parts)
    left = max(0, min(length, shape[dim] - place * length))
    return (*shape[:dim], left, *shape[dim + 1 :])
