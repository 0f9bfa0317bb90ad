"""Where a token stands: rotary tables, Llama 3.1's scaling of them, and places counted within documents."""

import math

import torch
from torch import Tensor

from meshwright.spec import ModelSpec, RopeScaling


def rotary_tables(places: Tensor, spec: ModelSpec) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32, of the angles that each place turns each pair of a head's numbers by.

    places: [S], giving tables [S, 1, E/2]; or [B, S], giving [B, S, 1, E/2]. All heads share them.
    """
    pairs = torch.arange(0, spec.head_dim, 2, device=places.device, dtype=torch.float32)  # [E/2]
    frequencies = spec.rope_theta ** (-pairs / spec.head_dim)
    if spec.rope_scaling is not None:
        frequencies = stretch(frequencies, spec.rope_scaling)
    angles = places.float()[..., None, None] * frequencies
    return angles.cos(), angles.sin()


def stretch(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's frequencies [E/2] for more positions than the model was first trained on.

    Those that turn often within the original positions tell neighbours apart and stay; those that never come round
    are slowed by the factor; between the two, a weight that is linear in the number of turns.
    """
    turns = scaling.original_positions * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
    kept = kept.clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + E/2) of x [B, S, heads, E], as Hugging Face's Llama pairs them.

    Given fp32 tables, a bf16 x is turned in fp32 and rounded once: bf16 cannot tell the angles of neighbouring
    far positions apart. Compiled, that is one fused kernel and costs no memory.
    """
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def place_in_document(documents: Tensor) -> Tensor:
    """Each token's place in its own document [B, S], from the documents' numbers [B, S], which never fall."""
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return places - torch.where(begins, places, 0).cummax(dim=1).values
