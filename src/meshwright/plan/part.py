"""The part of a model that one rank holds and computes with: its stages along pipeline, split along tensor by the
family's table, experts along expert, and the whole along shard and context."""

from collections.abc import Sequence
from math import ceil, prod

import msgspec

from meshwright.spec import (
    Job,
    Layout,
    ModelSpec,
    SplitTable,
    block_shapes,
    end_shapes,
    held_stages,
    split_of,
    split_table,
    stage_blocks,
    stage_count,
)

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
# Masters, reduced gradients and optimizer states are fp32 in every precision (spec.Layout).
STATE_BYTES = 4
# Routed experts, stacked: divided by whole experts along expert, and never along tensor.
ROUTED = "feed_forward.experts."


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """A block, the embedding or the head, as the fullest rank of the tensor and expert axes has it.

    elements: parameters where it is gathered; routed: of those, the routed experts'. local: parameters that the rank
    holds between. tensors: number of parameter tensors. summed: elements of each parameter that is whole on all ranks
    of the tensor axis, whose gradients they sum.
    """

    shapes: Shapes = {}
    elements: int = 0
    routed: int = 0
    local: int = 0
    tensors: int = 0
    summed: tuple[int, ...] = ()


class Cut(msgspec.Struct, frozen=True, kw_only=True):
    """A job's whole model in groups, which stages are put together from.

    dense: number of first blocks that a mixture keeps without experts; they are `first`, all others alike.
    """

    model: ModelSpec
    tensor: int
    dense: int
    first: Group
    others: Group
    root: Group
    head: Group


# Of a stage: root, head, its blocks, and how many of them are recomputed and dense.
Kind = tuple[bool, bool, int, int, int]


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """One pipeline stage: blocks `start` to `stop`; root, head: whether the embedding or the head is with them."""

    index: int
    start: int
    stop: int
    root: bool
    head: bool

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return self.stop - self.start

    def first(self, blocks: int) -> int:
        """How many of the model's first `blocks` it holds."""
        return min(max(0, blocks - self.start), self.layers)

    def kind(self, cut: Cut, again: int) -> Kind:
        """What stages have in common that hold as much as each other, where the first `again` blocks are recomputed."""
        return self.root, self.head, self.layers, self.first(again), self.first(cut.dense)

    def runs(self, cut: Cut) -> list[tuple[int, Group]]:
        """(number, group) of its blocks that are alike, in order."""
        dense = self.first(cut.dense)
        return [run for run in ((dense, cut.first), (self.layers - dense, cut.others)) if run[0]]

    def groups(self, cut: Cut) -> list[tuple[int, Group]]:
        """(number, group) of all that it holds, in order."""
        ends = [(1, cut.root)] if self.root else [], [(1, cut.head)] if self.head else []
        return [*ends[0], *self.runs(cut), *ends[1]]


class Groups(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters (elements) of a rank's FSDP groups: mean block, largest block, head with its norm, root.

    Routed experts are a group beside their block's, and may be sharded where the rest is not, or the other way round.
    largest_plain, largest_routed: the largest of either. routed: of all blocks.
    """

    block: float
    largest_block: int
    largest_plain: int
    largest_routed: int
    routed: int
    head: int
    root: int
    layers: int

    def whole(self) -> int:
        """All of them."""
        return round(self.layers * self.block) + self.head + self.root


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank of the pipeline axis has of a job's model; along the other axes, what the fullest there has.

    groups: whole along shard and context. local: parameters (elements) that the rank holds. tensors: number of
    parameter tensors.
    """

    cut: Cut
    rank: int
    stages: tuple[Stage, ...]
    groups: Groups
    local: int
    tensors: int


def holds_whole(layout: Layout, shards: int) -> bool:
    """Whether parameters over so many shards, and their gradients, stay whole from one microbatch to the next."""
    return shards == 1 or layout.zero == 1


def build_part(job: Job, rank: int = 0) -> Part:
    """The part of one rank along pipeline. It depends on the axes, the schedule and the split into stages alone."""
    return build_parts(job, (rank,))[0]


def build_parts(
    job: Job, ranks: Sequence[int] | None = None, cut: Cut | None = None, stages: Sequence[Stage] | None = None
) -> tuple[Part, ...]:
    """The parts of these ranks along pipeline, or of all. cut, stages: what cut_model and build_stages give, where the
    caller has it."""
    layout = job.layout
    cut = cut or cut_model(job)
    stages = stages or build_stages(job)
    return tuple(
        part_of(cut, rank, tuple(stages[stage] for stage in held_stages(layout, rank)))
        for rank in (range(layout.pipeline) if ranks is None else ranks)
    )


def build_stages(job: Job) -> list[Stage]:
    """Every stage of the job's pipeline."""
    last = stage_count(job.layout) - 1
    return [
        Stage(index=index, start=blocks.start, stop=blocks.stop, root=index == 0, head=index == last)
        for index, blocks in enumerate(stage_blocks(job.model, job.layout, job.data.sequence))
    ]


def part_of(cut: Cut, rank: int, stages: tuple[Stage, ...]) -> Part:
    """A rank's stages, summed up."""
    held = [group for stage in stages for group in stage.groups(cut)]
    blocks = [run for stage in stages for run in stage.runs(cut)]
    layers = sum(stage.layers for stage in stages)
    return Part(
        cut=cut,
        rank=rank,
        stages=stages,
        groups=Groups(
            block=sum(count * group.elements for count, group in blocks) / layers,
            largest_block=max(group.elements for _, group in blocks),
            largest_plain=max(group.elements - group.routed for _, group in blocks),
            largest_routed=max(group.routed for _, group in blocks),
            routed=sum(count * group.routed for count, group in blocks),
            head=cut.head.elements if any(stage.head for stage in stages) else 0,
            root=cut.root.elements if any(stage.root for stage in stages) else 0,
            layers=layers,
        ),
        local=sum(count * group.local for count, group in held),
        tensors=sum(count * group.tensors for count, group in held),
    )


def cut_model(job: Job) -> Cut:
    """The model in groups. They depend on the sizes of the axes alone."""
    model, layout = job.model, job.layout
    before, after = end_shapes(model)
    if model.tied_embeddings and layout.pipeline > 1:
        # The last stage has a copy of the embedding of its own.
        after = after | {"head.weight": before["embedding.weight"]}
    elif model.tied_embeddings:
        # A tied head stays with the embedding in the root, and its norm with it.
        before, after = before | after, {}
    return Cut(
        model=model,
        tensor=layout.tensor,
        dense=model.experts.dense_layers if model.experts else 0,
        first=build_group(model, layout, block_shapes(model, 0), "blocks.0."),
        others=build_group(model, layout, block_shapes(model), f"blocks.{model.layers - 1}."),
        root=build_group(model, layout, before),
        head=build_group(model, layout, after),
    )


def build_group(model: ModelSpec, layout: Layout, whole: Shapes, prefix: str = "") -> Group:
    """One group of parameters, cut as the layout says."""
    table = split_table(model)
    shapes: Shapes = {
        name: split_experts(shape, layout.expert)
        if name.startswith(ROUTED)
        else split_shape(model, table, prefix + name, shape, layout.tensor)
        for name, shape in whole.items()
    }
    routed = {name: shape for name, shape in shapes.items() if name.startswith(ROUTED)}
    others = {name: shape for name, shape in shapes.items() if name not in routed}
    same = (name for name, shape in others.items() if layout.tensor > 1 and shape == whole[name])
    return Group(
        shapes=shapes,
        elements=elements(shapes),
        routed=elements(routed),
        local=local_elements(others, layout.parameter_shards) + local_routed(routed, layout.expert_shard),
        tensors=len(shapes),
        summed=tuple(prod(shapes[name]) for name in same),
    )


def split_experts(shape: Shape, ranks: int) -> Shape:
    """A stack of experts, divided over the expert axis."""
    return (ceil(shape[0] / ranks), *shape[1:])


def split_shape(model: ModelSpec, table: SplitTable, name: str, shape: Shape, tensor: int) -> Shape:
    """What the fullest rank has of one parameter: rows and columns are split as torch.chunk does, rounding up."""
    dim = split_dim(model, table, name, shape, tensor)
    return shape if dim is None else (*shape[:dim], ceil(shape[dim] / tensor), *shape[dim + 1 :])


def split_dim(model: ModelSpec, table: SplitTable, name: str, shape: Shape, tensor: int) -> int | None:
    """The dim of a parameter that is divided along tensor; None where it is whole on each rank."""
    word = split_of(table, name.removesuffix(".weight").removesuffix(".bias"))
    whole_heads = word == "kv_heads" and model.kv_heads % tensor
    if tensor == 1 or whole_heads or word not in ("vocabulary", "logits", "column", "kv_heads", "row"):
        return None
    if word == "row":
        # Its bias is added once, after the sum over ranks.
        return None if len(shape) == 1 else len(shape) - 1
    return 0


def elements(shapes: Shapes) -> int:
    """Elements of all of them."""
    return sum(prod(shape) for shape in shapes.values())


def local_elements(shapes: Shapes, ranks: int) -> int:
    """Elements that the fullest rank holds: dim 0 is split as torch.chunk does, in rows of ceil(rows / ranks)."""
    return sum(ceil(shape[0] / ranks) * prod(shape[1:]) for shape in shapes.values())


def local_routed(shapes: Shapes, ranks: int) -> int:
    """The same of stacked experts, each of which is split evenly, by its rows or its columns."""
    return sum(prod(shape) // ranks for shape in shapes.values())
