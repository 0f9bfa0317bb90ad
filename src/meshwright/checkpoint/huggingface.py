"""Weights in from a Hugging Face folder: each rank reads the slices that its part of the model needs."""

import torch
from safetensors import safe_open
from torch import nn

from meshwright.parallel import local_part
from meshwright.spec import ModelSpec, home_of
from meshwright.spec.pretrained import Stored, read_stored
from meshwright.spec.tensors import Piece, pieces_of


def load_pretrained(model: nn.Module, spec: ModelSpec) -> None:
    """Fill a model, or this rank's part of one, from the folder that its spec names, which check_weights let pass.

    One slice is in memory at a time, and only of what this rank holds.
    """
    stored = read_stored(spec)
    pieces: dict[str, list[Piece]] = {}
    for piece in pieces_of(spec):
        pieces.setdefault(piece.ours, []).append(piece)
    for name, parameter in model.named_parameters():
        local, offset, shape = local_part(parameter.detach())
        for piece in pieces[home_of(spec, name)] if local.numel() else ():
            if piece.expert is None:
                local.copy_(read_slice(stored[piece.theirs], piece, offset, shape))
            elif 0 <= piece.expert - offset[0] < shape[0]:
                local[piece.expert - offset[0]].copy_(read_slice(stored[piece.theirs], piece, offset[1:], shape[1:]))


def read_slice(stored: Stored, piece: Piece, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
    """A block of one of our parameters, cut out of the tensor that holds it."""
    first = (offset[0] + piece.first, *offset[1:])
    block = [slice(begin, begin + size) for begin, size in zip(first, shape, strict=True)]
    # Opened for each slice: a mapping that stays would keep every page that was read.
    with safe_open(stored.file, framework="pt") as file:
        found = file.get_slice(stored.name)
        return found[*block[::-1]].T if piece.transposed else found[*block]
