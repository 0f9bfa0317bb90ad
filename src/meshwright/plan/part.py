"""The part of a model that one rank holds and computes with: along tensor by its family's split table, along shard."""

from math import ceil, prod

import msgspec

from meshwright.spec import SPLIT_TABLES, Job, ModelSpec, SplitTable, block_shapes, end_shapes, split_of

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


class Groups(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters (elements) of FSDP's groups: the mean block and the largest, the head with its norm, and the root."""

    block: float
    largest_block: int
    head: int
    root: int
    layers: int

    def whole(self) -> int:
        """All of them."""
        return round(self.layers * self.block) + self.head + self.root


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What the fullest rank has of a job's model along the tensor axis, and of that along the shard axis.

    blocks: each kind of block with the number of its blocks, and the shapes of its parameters along tensor: a mixture's
    first blocks may have no experts. groups: whole along shard. local: parameters (elements) that the rank holds.
    tensors: number of parameter tensors. summed, summed_ends: elements of each parameter that is whole on all ranks of
    the tensor axis, whose gradients they sum: of one block, and of the rest of the model.
    """

    model: ModelSpec
    tensor: int
    blocks: tuple[tuple[int, Shapes], ...]
    groups: Groups
    local: int
    tensors: int
    summed: tuple[int, ...]
    summed_ends: tuple[int, ...]


def build_part(job: Job) -> Part:
    """The fullest rank's part of the job's model. It depends on the sizes of the tensor and shard axes alone."""
    model, tensor, shard = job.model, job.layout.tensor, job.layout.shard
    table = SPLIT_TABLES[model.family]

    def part(shapes: Shapes, prefix: str = "") -> Shapes:
        return {name: split_shape(model, table, prefix + name, shape, tensor) for name, shape in shapes.items()}

    before, after = end_shapes(model)
    root, head = part(before), part(after)
    if model.tied_embeddings:
        # A tied head stays with the embedding in the root, and its norm with it.
        root, head = root | head, {}
    whole_ends = before | after
    dense = model.experts.dense_layers if model.experts else 0
    whole_block = block_shapes(model)
    first, others = part(block_shapes(model, 0), "blocks.0."), part(whole_block, "blocks.0.")
    blocks = tuple(kind for kind in ((dense, first), (model.layers - dense, others)) if kind[0])
    stretches = [*blocks, (1, root), (1, head)]
    return Part(
        model=model,
        tensor=tensor,
        blocks=blocks,
        groups=build_groups(blocks, root, head),
        local=sum(count * local_elements(shapes, shard) for count, shapes in stretches),
        tensors=sum(count * len(shapes) for count, shapes in stretches),
        summed=same_shape(others, whole_block) if tensor > 1 else (),
        summed_ends=same_shape(root | head, whole_ends) if tensor > 1 else (),
    )


def same_shape(part: Shapes, whole: Shapes) -> tuple[int, ...]:
    """Elements of each parameter that is in the part as it is in the whole."""
    return tuple(prod(shape) for name, shape in whole.items() if part[name] == shape)


def build_groups(blocks: tuple[tuple[int, Shapes], ...], root: Shapes, head: Shapes) -> Groups:
    """FSDP's groups as parallel/shard.py makes them."""
    sizes = [(count, elements(shapes)) for count, shapes in blocks]
    layers = sum(count for count, _ in blocks)
    return Groups(
        block=sum(count * size for count, size in sizes) / layers,
        largest_block=max(size for _, size in sizes),
        head=elements(head),
        root=elements(root),
        layers=layers,
    )


def split_shape(model: ModelSpec, table: SplitTable, name: str, shape: Shape, tensor: int) -> Shape:
    """What the fullest rank has of one parameter: rows and columns are split as torch.chunk does, rounding up."""
    word = split_of(table, name.removesuffix(".weight").removesuffix(".bias"))
    whole_heads = word == "kv_heads" and model.kv_heads % tensor
    if tensor == 1 or whole_heads or word not in ("vocabulary", "logits", "column", "kv_heads", "row"):
        return shape
    if word == "row":
        # Its bias is added once, after the sum over ranks.
        return shape if len(shape) == 1 else (*shape[:-1], ceil(shape[-1] / tensor))
    # Outputs are a matrix's rows; in a stack of experts' matrices the dim before the last.
    dim = max(0, len(shape) - 2)
    return (*shape[:dim], ceil(shape[dim] / tensor), *shape[dim + 1 :])


def elements(shapes: Shapes) -> int:
    """Elements of all of them."""
    return sum(prod(shape) for shape in shapes.values())


def local_elements(shapes: Shapes, shard: int) -> int:
    """Elements that the fullest rank holds: dim 0 is split as torch.chunk does, in rows of ceil(rows / shard).

    Stacked experts count as split evenly along both dims before the last: no trainer here splits them yet, and by
    experts alone some ranks would hold twice what others do.
    """
    split = ((shape, max(1, len(shape) - 1)) for shape in shapes.values())
    return sum(ceil(prod(shape[:dim]) / shard) * prod(shape[dim:]) for shape, dim in split)
