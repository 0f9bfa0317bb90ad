"""What a forward pass knows of its tokens beside themselves: where each one stands, and what it may see."""

from typing import NamedTuple

import torch
from torch import Tensor

from meshwright.models.attention import Mask, build_mask
from meshwright.models.positions import place_in_document
from meshwright.spec import ModelSpec


class View(NamedTuple):
    """places: [S], or [B, S] where samples differ: each token's place, for its position. mask: what it may see."""

    places: Tensor
    mask: Mask


def build_view(spec: ModelSpec, sequence: int, documents: Tensor | None, device: torch.device) -> View:
    """The view of whole samples of `sequence` tokens.

    documents: [B, S] int32, each token's document in its sample, counted from 0. Given, a token attends to its own
    document alone, and places count from the document's start.
    """
    places = place_tokens(sequence, documents, device)
    return View(places, build_mask(sequence, documents, spec.attention_window, device))


def place_tokens(sequence: int, documents: Tensor | None, device: torch.device) -> Tensor:
    """Where each token stands: in its sample, [S], or in its own document, [B, S]."""
    return torch.arange(sequence, device=device) if documents is None else place_in_document(documents)
