"""Matrix products, attention, whole blocks and the loss, forward and backward, on one device."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from meshwright.calibrate.clock import Clock
from meshwright.calibrate.sizes import BlockSize, Sizes
from meshwright.models import Block, attend, rotary_tables, token_loss
from meshwright.record.calibration import Figure
from meshwright.spec import ModelSpec

# Of the one product outside the precision that blocks compute in.
FP32_SIDE = 4096


def measure_products(clock: Clock, sizes: Sizes) -> Iterator[Figure]:
    """Activations times a weight, as a block's matrices are applied."""
    for rows, inner, columns in sizes.products:
        x, weight = clock.normal(rows, inner), clock.normal(columns, inner)
        yield clock.measure("product", (rows, inner, columns), lambda x=x, weight=weight: F.linear(x, weight))
    if clock.device.type == "cuda":
        x, weight = (clock.normal(FP32_SIDE, FP32_SIDE, dtype=torch.float32) for _ in range(2))
        yield clock.measure("product.fp32", (FP32_SIDE,) * 3, lambda: F.linear(x, weight))


def measure_attention(clock: Clock, sizes: Sizes) -> Iterator[Figure]:
    """Causal attention, forward alone and with its backward pass, by the kernel that PyTorch picks."""
    for size in sizes.attention:
        yield from measure_kernel(clock, "attention", size)


def measure_flash(clock: Clock, sizes: Sizes) -> Iterator[Figure]:
    """The same by FlashAttention, which other trainers use. Raises RuntimeError where the device has no such kernel."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        for size in sizes.attention:
            yield from measure_kernel(clock, "attention.flash", size)


def measure_kernel(clock: Clock, name: str, size: tuple[int, ...]) -> Iterator[Figure]:
    """One size of it. Heads lie beside each other in memory, as a matrix product leaves them."""
    sequences, heads, sequence, head_dim = size
    query, key, value = (
        clock.normal(sequences, sequence, heads, head_dim, graded=True).transpose(1, 2) for _ in range(3)
    )
    gradient = clock.normal(sequences, heads, sequence, head_dim)

    def forward() -> Tensor:
        return attend(query, key, value, None)

    def both() -> None:
        torch.autograd.grad(forward(), (query, key, value), gradient)

    yield clock.measure(f"{name}.forward", size, forward)
    yield clock.measure(f"{name}.both", size, both)


def measure_scores(clock: Clock, sizes: Sizes) -> Iterator[Figure]:
    """The two products of attention whose scores lie in memory."""
    for size in sizes.scores:
        sequences, heads, sequence, head_dim = size
        query, key, value = (clock.normal(sequences, heads, sequence, head_dim) for _ in range(3))
        yield clock.measure("scores", size, lambda q=query, k=key, v=value: (q @ k.transpose(2, 3)) @ v)


def measure_blocks(clock: Clock, sizes: Sizes) -> Iterator[Figure]:
    """A decoder block forward and backward, operator by operator, and on a GPU compiled too, as it is trained."""
    for size in sizes.blocks:
        block = build_own_block(clock, size)
        yield measure_block(clock, "block.eager", size, block, block.forward)
        if clock.device.type == "cuda":
            yield measure_block(clock, "block.compiled", size, block, torch.compile(block.forward, dynamic=False))


def measure_block(clock: Clock, name: str, size: BlockSize, block: Block, forward: Callable[..., Tensor]) -> Figure:
    """One size and form of it."""
    numbers = (size.d_model, size.heads, size.kv_heads, size.head_dim, size.feed_forward, size.sequences, size.sequence)
    tables = rotary_tables(torch.arange(size.sequence, device=clock.device), spec_of(size))
    x = clock.normal(size.sequences, size.sequence, size.d_model, graded=True)
    gradient = clock.normal(size.sequences, size.sequence, size.d_model)
    wanted = [x, *block.parameters()]
    return clock.measure(name, numbers, lambda: torch.autograd.grad(forward(x, tables, None), wanted, gradient))


def build_own_block(clock: Clock, size: BlockSize) -> Block:
    """A block of this size with random weights, in the precision that it computes in."""
    with torch.device(clock.device):
        return Block(spec_of(size)).to(clock.dtype)


def spec_of(size: BlockSize) -> ModelSpec:
    """A model of such blocks."""
    return ModelSpec(
        layers=1,
        d_model=size.d_model,
        heads=size.heads,
        kv_heads=size.kv_heads,
        head_dim=size.head_dim,
        feed_forward=size.feed_forward,
        vocabulary=2,
    )


def measure_loss(clock: Clock, sizes: Sizes) -> Iterator[Figure]:
    """Cross entropy and the gradient of its logits, compiled on a GPU as it is trained."""
    loss = torch.compile(token_loss, dynamic=False) if clock.device.type == "cuda" else token_loss
    for tokens, vocabulary in sizes.logits:
        logits = clock.normal(1, tokens, vocabulary, graded=True)
        targets = torch.randint(vocabulary, (1, tokens), device=clock.device)
        yield clock.measure(
            "loss",
            (tokens, vocabulary),
            lambda logits=logits, targets=targets: torch.autograd.grad(loss(logits, targets), logits),
        )
