"""All-to-all attention: before it, ranks exchange tokens of all heads for all tokens of some heads; after it, back.

Between the two exchanges a rank has whole sequences, so any attention will do. Fewer key heads than ranks are repeated.

The exchange is one operator to torch, as the ring is (ring.py says why).
"""

from math import lcm
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from meshwright.models import Mask, attend
from meshwright.parallel.mesh import named_group
from meshwright.record.kineto import PREFIX

SCHEMA = "(Tensor x, bool whole, int size, str group) -> Tensor"


def attend_whole(size: int, group: str, query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """query: [B, H, S/C, E]; key, value: [B, K, S/C, E]; mask: of whole sequences. Returns [B, H, S/C, E]."""
    # Ranks take query heads in turn, and with each the key head that it looks at.
    repeats = lcm(key.shape[1], size) // key.shape[1]
    if repeats > 1:
        key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
    parts = [part.unflatten(1, (size, -1)) for part in (query, key, value)]  # each [B, C, heads, S/C, E]
    heads = [part.shape[2] for part in parts]
    # One transfer for all three.
    whole = exchange(torch.cat(parts, dim=2).flatten(1, 2), True, size, group)
    query, key, value = whole.split(heads, dim=1)
    return exchange(attend(query, key, value, mask), False, size, group)


@torch.library.custom_op("meshwright::exchange", mutates_args=(), schema=SCHEMA)
def exchange(x: Tensor, whole: bool, size: int, group: str) -> Tensor:
    """Heads for tokens, [B, heads, S/C, E] to [B, heads/C, S, E] with tokens in their order; not `whole`: back.

    Rank r's tokens are chunks r and 2C - 1 - r of 2C.
    """
    if whole:
        sent = x.unflatten(1, (size, -1)).transpose(0, 1)  # [C, B, heads/C, S/C, E]
    else:
        chunks = x.unflatten(2, (2 * size, -1))  # [B, heads/C, 2C, S/2C, E]
        early, late = chunks[:, :, :size], chunks[:, :, size:].flip(2)
        sent = torch.stack([early, late], dim=3).flatten(3, 4).movedim(2, 0)  # [C, B, heads/C, S/C, E]
    received = torch.empty(sent.shape, dtype=x.dtype, device=x.device)
    with record_function(PREFIX + "context"):
        dist.all_to_all_single(received, sent.contiguous(), group=named_group(group))
    if not whole:
        return received.transpose(0, 1).flatten(1, 2).contiguous()
    early, late = received.unflatten(3, (2, -1)).movedim(0, 2).unbind(3)  # each [B, heads/C, C, S/2C, E]
    return torch.cat([early, late.flip(2)], dim=2).flatten(2, 3)


@exchange.register_fake
def _(x: Tensor, whole: bool, size: int, _group: str) -> Tensor:
    batch, heads, tokens, width = x.shape
    return x.new_empty(
        (batch, heads // size, tokens * size, width) if whole else (batch, heads * size, tokens // size, width)
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 (torch passes it by name)
    _, ctx.whole, ctx.size, ctx.group = inputs


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    # Each number goes to one place and comes from one place, so its gradient takes the way back.
    return exchange(gradient, not ctx.whole, ctx.size, ctx.group), None, None, None


exchange.register_autograd(_backward, setup_context=_keep)
# By which selective recompute knows it.
EXCHANGE = torch.ops.meshwright.exchange.default
