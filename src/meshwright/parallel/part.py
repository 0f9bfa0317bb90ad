"""Which part of a whole tensor a rank holds."""

import torch
from torch.distributed.tensor import DTensor, Shard

# A tensor's dim split into parts of this offset and length.
Extent = tuple[int, int]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor; all of one that is not split."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...], tuple[int, ...]]:
    """This rank's part of a tensor, with its offset and shape within the whole.

    Where a dim is split along several axes, FSDP splits last what the others left: it marks its placement as
    strided and stands first in the mesh, so plain splits are counted before strided ones. (torch's own function for
    this takes every split as even.)
    """
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.dim(), tuple(tensor.shape)
    coordinates = tensor.device_mesh.get_coordinate()
    assert coordinates is not None
    splits = list(zip(tensor.placements, tensor.device_mesh.shape, coordinates, strict=True))
    extents: list[Extent] = [(0, length) for length in tensor.shape]
    for placement, size, coordinate in sorted(splits, key=lambda split: type(split[0]) is not Shard):
        if not placement.is_replicate():
            dim = placement.dim  # pyright: ignore[reportAttributeAccessIssue]
            extents[dim] = cut(extents[dim], size, coordinate)
    return tensor.to_local(), tuple(offset for offset, _ in extents), tuple(length for _, length in extents)


def cut(extent: Extent, parts: int, part: int) -> Extent:
    """One of the parts that torch.chunk makes of an extent; the last may be shorter, or empty."""
    offset, length = extent
    rows = -(-length // parts)
    start = min(part * rows, length)
    return offset + start, min(rows, length - start)


def copy_whole(parameter: torch.Tensor, whole: torch.Tensor) -> None:
    """Copy this rank's part of a whole tensor, known to every rank, into a parameter."""
    part, offset, shape = local_part(parameter)
    part.copy_(whole[tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))])
