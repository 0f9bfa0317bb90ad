"""Attention between some queries and some keys of a longer sequence: what a ring puts together, piece by piece.

Beside what they mix, queries need the logarithm of the sum over these keys of their exponentiated scores: with both,
results over different keys add up to the result over all of them. The backward pass of a piece is given the sum over
all keys, so its gradients are parts of the whole ones and are simply added.

torch's fused kernels return that sum, and their backward passes take it; each device and precision has its own. They
see all keys or the causal past. Any other mask, and head widths that a kernel does not take, are computed plainly, on
few queries at a time.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten

Gradients = tuple[Tensor, Tensor, Tensor]
# From here on scaled_dot_product_attention prefers cuDNN's kernel, which has only been held to the others there.
HOPPER = (9, 0)
# Scores that the plain kernel holds at once: 256 MB in fp32.
LARGEST_TILE = 2**26


class Kernel(NamedTuple):
    """A way to compute a piece.

    forward: queries [B, H, Q, E], keys and values [B, K, P, E] and whether causal, to what they mix [B, H, Q, E] and
    the log-sums [B, H, Q]. backward: the gradient of the output, queries, keys, values, the output and log-sums over
    all keys, and whether causal, to the gradients of queries, keys and values.
    """

    forward: Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool], Gradients]


def choose_kernel(query: Tensor) -> Kernel | None:
    """The fused kernel for these queries [B, H, Q, E]; None: there is none, and the plain one must do."""
    width = query.shape[-1]
    if query.device.type == "cpu":
        return Kernel(flash_cpu, flash_cpu_backward)
    # The limits of torch's CUDA kernels; scaled_dot_product_attention pads where we take the plain kernel.
    if query.dtype in (torch.bfloat16, torch.float16) and width % 8 == 0 and width <= 256:
        fastest = width <= 128 and torch.cuda.get_device_capability(query.device) >= HOPPER
        return Kernel(cudnn, cudnn_backward) if fastest else Kernel(flash_cuda, flash_cuda_backward)
    return Kernel(efficient, efficient_backward) if width % 8 == 0 else None


def spread_heads(heads: int, *tensors: Tensor) -> list[Tensor]:
    """Key heads [B, K, P, E], each repeated for the queries that share it: [B, H, P, E]."""
    return [tensor.repeat_interleave(heads // tensor.shape[1], dim=1) for tensor in tensors]


def gather_heads(kv_heads: int, *gradients: Tensor) -> list[Tensor]:
    """Gradients of repeated key heads [B, H, P, E], summed for each key head: [B, K, P, E]."""
    return [gradient.unflatten(1, (kv_heads, -1)).sum(2) for gradient in gradients]


# --- CPU ------------------------------------------------------------------------------------------------------------


def flash_cpu(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """torch's flash attention on a CPU, which wants a key head for each query head."""
    key, value = spread_heads(query.shape[1], key, value)
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal)


def flash_cpu_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sums: Tensor, causal: bool
) -> Gradients:
    """Its backward pass."""
    keys, values = spread_heads(query.shape[1], key, value)
    of_query, *others = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, query, keys, values, out, log_sums, 0.0, causal
    )
    of_key, of_value = gather_heads(key.shape[1], *others)
    return of_query, of_key, of_value


# --- CUDA, 16 bits --------------------------------------------------------------------------------------------------


def flash_cuda(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Flash attention on a GPU, which knows of shared key heads by itself."""
    out, log_sums, *_ = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal)
    return out, log_sums


def flash_cuda_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sums: Tensor, causal: bool
) -> Gradients:
    """Its backward pass. Nothing is dropped out, so the generator's state is not looked at."""
    state, offset = (torch.empty(shape, dtype=torch.uint64, device=query.device) for shape in ((2,), ()))
    lengths = (query.shape[2], key.shape[2])
    # The kernel reads log-sums by their shape, not by their strides.
    log_sums = log_sums.contiguous()
    return aten._scaled_dot_product_flash_attention_backward(
        gradient, query, key, value, out, log_sums, None, None, *lengths, 0.0, causal, state, offset
    )


def cudnn(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """cuDNN's attention, which knows of shared key heads by itself."""
    out, log_sums, *_ = aten._scaled_dot_product_cudnn_attention(query, key, value, None, True, 0.0, causal)
    return out, log_sums.view(query.shape[:3])


def cudnn_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sums: Tensor, causal: bool
) -> Gradients:
    """Its backward pass. Nothing is dropped out, so the generator's state is not looked at."""
    state, offset = (torch.zeros((), dtype=torch.int64, device=query.device) for _ in range(2))
    lengths = (query.shape[2], key.shape[2])
    log_sums = log_sums.contiguous()[..., None]
    return aten._scaled_dot_product_cudnn_attention_backward(
        gradient, query, key, value, out, log_sums, state, offset, None, None, None, *lengths, 0.0, causal
    )


# --- CUDA, 32 bits --------------------------------------------------------------------------------------------------

# The kernel pads its log-sums to a multiple of this many queries, and wants them padded in the backward pass.
PADDED_QUERIES = 32


def efficient(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Memory-efficient attention, the fused kernel that a GPU has for fp32; it wants a key head for each query head."""
    key, value = spread_heads(query.shape[1], key, value)
    out, log_sums, *_ = aten._scaled_dot_product_efficient_attention(query, key, value, None, True, 0.0, causal)
    return out, log_sums[..., : query.shape[2]]


def efficient_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sums: Tensor, causal: bool
) -> Gradients:
    """Its backward pass. Nothing is dropped out, so the generator's state is not looked at."""
    keys, values = spread_heads(query.shape[1], key, value)
    padding = -query.shape[2] % PADDED_QUERIES
    padded = torch.nn.functional.pad(log_sums, (0, padding), value=torch.inf).contiguous()
    state, offset = (torch.empty((), dtype=torch.int64, device=query.device) for _ in range(2))
    wanted = [True, True, True, False]
    of_query, *others, _ = aten._scaled_dot_product_efficient_attention_backward(
        gradient, query, keys, values, None, out, padded, state, offset, 0.0, wanted, causal
    )
    of_key, of_value = gather_heads(key.shape[1], *others)
    return of_query, of_key, of_value


# --- Any device, any mask -------------------------------------------------------------------------------------------


def tile_rows(query: Tensor, keys: int) -> int:
    """Queries that the plain kernel takes at once against this many keys."""
    return max(1, LARGEST_TILE // (query.shape[0] * query.shape[1] * keys))


def plain(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Attention by the book, in fp32 at least. seen: booleans that broadcast to [B, H, Q, P]."""
    scores, _, _, values = score(query, key, value, seen)
    log_sums = scores.logsumexp(-1)
    # A query that sees none of these keys has a sum of zero; taken from its scores it would give nan instead of 0.
    chances = (scores - log_sums.masked_fill(log_sums.isneginf(), 0.0)[..., None]).exp()
    return (chances @ values).flatten(1, 2), log_sums.flatten(1, 2)


def plain_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sums: Tensor, seen: Tensor
) -> Gradients:
    """Its backward pass."""
    scores, queries, keys, values = score(query, key, value, seen)
    grouped = (key.shape[1], -1)
    wide, out = (part.unflatten(1, grouped).to(scores.dtype) for part in (gradient, out))
    chances = (scores - log_sums.unflatten(1, grouped)[..., None]).exp()
    of_scores = chances * (wide @ values.mT - (wide * out).sum(-1, keepdim=True)) * query.shape[-1] ** -0.5
    of_query = (of_scores @ keys).flatten(1, 2)
    return of_query, (of_scores.mT @ queries).sum(2), (chances.mT @ wide).sum(2)


def score(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores [B, K, H/K, Q, P], minus infinity where not seen; and queries, keys, values, in fp32, grouped so."""
    wide = torch.promote_types(query.dtype, torch.float32)
    queries = query.unflatten(1, (key.shape[1], -1)).to(wide)  # [B, K, H/K, Q, E]
    keys, values = key[:, :, None].to(wide), value[:, :, None].to(wide)  # [B, K, 1, P, E]
    scores = queries @ keys.mT * query.shape[-1] ** -0.5
    unseen = ~(seen[:, :, None] if seen.dim() == 4 else seen)
    return scores.masked_fill(unseen, -torch.inf), queries, keys, values
