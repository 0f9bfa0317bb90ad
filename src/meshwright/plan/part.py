"""The model as one rank of the tensor axis holds and computes it, by its family's split table."""

from math import ceil, prod

import msgspec

from meshwright.spec import SPLIT_TABLES, ModelSpec, SplitTable, block_shapes, end_shapes, split_of

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What the fullest rank of the tensor axis has of a model; all of it where the axis has one rank.

    first, others: shapes of the parameters of one block; the `dense` first blocks have those of `first` (a mixture's
    blocks without experts), all others those of `others`. root: what FSDP gathers with the embedding; head: what it
    gathers with the head. A tied head is in the root, and its norm with it.
    """

    model: ModelSpec
    tensor: int
    dense: int
    first: Shapes
    others: Shapes
    root: Shapes
    head: Shapes

    def kinds(self) -> tuple[tuple[int, Shapes], ...]:
        """Each kind of block with the number of its blocks."""
        others = self.model.layers - self.dense
        return tuple(kind for kind in ((self.dense, self.first), (others, self.others)) if kind[0])

    def tensors(self) -> int:
        """Number of parameter tensors."""
        return sum(count * len(shapes) for count, shapes in self.kinds()) + len(self.root) + len(self.head)


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


def build_part(model: ModelSpec, tensor: int) -> Part:
    """The fullest rank's part of `model` along a tensor axis of `tensor` ranks."""
    table = SPLIT_TABLES[model.family]

    def part(shapes: Shapes, prefix: str = "") -> Shapes:
        return {name: split_shape(model, table, prefix + name, shape, tensor) for name, shape in shapes.items()}

    before, after = end_shapes(model)
    root, head = (before | after, {}) if model.tied_embeddings else (before, after)
    return Part(
        model=model,
        tensor=tensor,
        dense=model.experts.dense_layers if model.experts else 0,
        first=part(block_shapes(model, 0), "blocks.0."),
        others=part(block_shapes(model), "blocks.0."),
        root=part(root),
        head=part(head),
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


def build_groups(part: Part) -> Groups:
    """FSDP's groups as parallel/shard.py makes them: a tied head stays with the embedding in the root."""
    sizes = [(count, elements(shapes)) for count, shapes in part.kinds()]
    layers = part.model.layers
    return Groups(
        block=sum(count * size for count, size in sizes) / layers if layers else 0.0,
        largest_block=max((size for _, size in sizes), default=0),
        head=elements(part.head),
        root=elements(part.root),
        layers=layers,
    )


def local_parameters(part: Part, shard: int) -> int:
    """Parameters that the fullest rank holds: dim 0 is split as torch.chunk does, in rows of ceil(rows / shard).

    Stacked experts count as split evenly along both dims before the last: no trainer here splits them yet, and by
    experts alone some ranks would hold twice what others do.
    """

    def local(shapes: Shapes) -> int:
        split = ((shape, max(1, len(shape) - 1)) for shape in shapes.values())
        return sum(ceil(prod(shape[:dim]) / shard) * prod(shape[dim:]) for shape, dim in split)

    return sum(count * local(shapes) for count, shapes in part.kinds()) + local(part.root) + local(part.head)
