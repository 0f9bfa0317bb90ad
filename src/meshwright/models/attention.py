"""Attention over what a token may see: the causal past, or less of it."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from meshwright.models.positions import place_in_document

# None: the causal past, and nothing more to say. On a GPU the blocks to compute, elsewhere a table of booleans.
Mask = BlockMask | Tensor | None
# Queries [B, H, S, E], keys and values [B, K, S, E] and a mask to the values that the queries mix, [B, H, S, E].
Attend = Callable[[Tensor, Tensor, Tensor, Mask], Tensor]


# Queries, and keys, that flex_attention takes at once.
TILE = 128


def build_mask(sequence: int, documents: Tensor | None, window: int, device: torch.device) -> Mask:
    """What tokens may see of the causal past: their own document (documents: [B, S], or None for one), and of it the
    last `window` tokens (0: all)."""
    if documents is None and not 0 < window < sequence:
        return None
    first = first_seen(sequence, documents, window, device)
    if device.type == "cuda":
        return tile_mask(first)
    places = torch.arange(sequence, device=device)
    table = (places <= places[:, None]) & (places >= first[..., None])
    return table if documents is None else table[:, None]  # [S, S], or [B, 1, S, S]


def first_seen(sequence: int, documents: Tensor | None, window: int, device: torch.device) -> Tensor:
    """The first key that each query sees, [S] or [B, S]; from there to itself it sees them all."""
    places = torch.arange(sequence, device=device)
    first = torch.zeros_like(places) if documents is None else places - place_in_document(documents)
    return torch.maximum(first, places - window + 1) if window else first


def tile_mask(first: Tensor) -> BlockMask:
    """Which tiles attention computes, and which of them whole, by the first key that each query sees, [S] or [B, S].

    torch's create_block_mask asks for every query and key, and so takes memory by the square of the sequence. Here the
    first key seen never falls from one query to the next, so two queries of a tile tell all about it.
    """

    def visible(batch: Any, _head: Any, query: Any, key: Any) -> Any:
        return (query >= key) & (key >= (first[query] if first.dim() == 1 else first[batch, query]))

    sequence = first.shape[-1]
    begins = torch.arange(0, sequence, TILE, device=first.device)
    ends = (begins + TILE - 1).clamp(max=sequence - 1)
    at = first.view(-1, sequence)
    past = begins < begins[:, None]
    # Its last query sees its first key; as torch has it, a tile that hangs over the end is none.
    whole = past & (at[:, ends, None] <= begins) & (begins[:, None] + TILE <= sequence)
    some = (past & (at[:, begins, None] <= ends)) | (begins == begins[:, None])
    lists: list[Tensor] = []
    for table in (some & ~whole, whole):
        # How many tiles of keys each tile of queries has, and their numbers before all others.
        tiles = table[:, None].int()
        lists += [tiles.sum(-1, dtype=torch.int32), tiles.argsort(dim=-1, descending=True, stable=True).int()]
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=TILE, mask_mod=visible, seq_lengths=(sequence, sequence))


@cache
def compiled_flex() -> Callable[..., Any]:
    """flex_attention as one kernel. Uncompiled it is the same mathematics over whole tables of scores."""
    return torch.compile(flex_attention)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """query: [B, H, S, E]; key, value: [B, K, S, E]. Returns [B, H, S, E]."""
    grouped = key.shape[1] != query.shape[1]
    if isinstance(mask, BlockMask):
        # A block that is compiled takes it in; one that is not must not run it as it is.
        flex = flex_attention if torch.compiler.is_compiling() else compiled_flex()
        mixed = flex(query, key, value, block_mask=mask, enable_gqa=grouped)
        assert isinstance(mixed, Tensor)  # more than one only where more is asked for
        return mixed
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
