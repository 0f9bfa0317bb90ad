"""Attention over what a token may see: the causal past, or less of it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

# None: the causal past, and nothing more to say. On a GPU the blocks to compute, elsewhere a table of booleans.
Mask = BlockMask | Tensor | None
# Queries [B, H, S, E], keys and values [B, K, S, E] and a mask to the values that the queries mix, [B, H, S, E].
Attend = Callable[[Tensor, Tensor, Tensor, Mask], Tensor]


def build_mask(sequence: int, documents: Tensor | None, window: int, device: torch.device) -> Mask:
    """What tokens may see of the causal past: their own document (documents: [B, S], or None for one), and of it the
    last `window` tokens (0: all)."""
    windowed = 0 < window < sequence
    if documents is None and not windowed:
        return None

    def visible(batch: Any, _head: Any, query: Any, key: Any) -> Any:
        seen = query >= key
        if windowed:
            seen = seen & (query - key < window)
        if documents is not None:
            seen = seen & (documents[batch, query] == documents[batch, key])
        return seen

    batches = None if documents is None else documents.shape[0]
    if device.type == "cuda":
        # Computed once a forward pass and shared by its blocks; attention then skips the tiles that nobody sees.
        return create_block_mask(visible, batches, None, sequence, sequence, device=device)
    places = torch.arange(sequence, device=device)
    each = torch.arange(batches or 1, device=device)[:, None, None, None]
    return visible(each, None, places[:, None], places)  # [B or 1, 1, S, S], or [S, S]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """query: [B, H, S, E]; key, value: [B, K, S, E]. Returns [B, H, S, E]."""
    grouped = key.shape[1] != query.shape[1]
    if isinstance(mask, BlockMask):
        mixed = flex_attention(query, key, value, block_mask=mask, enable_gqa=grouped)
        assert isinstance(mixed, Tensor)  # more than one only where more is asked for
        return mixed
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
