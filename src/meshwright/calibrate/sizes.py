"""Which sizes are measured: those that transformers' steps are made of on such a device."""

import msgspec

from meshwright.spec import Device

KIB, MIB = 2**10, 2**20


class BlockSize(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder block on a microbatch."""

    d_model: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    sequences: int
    sequence: int


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """products: rows (tokens), inner dim and columns. attention: sequences, heads, tokens, head dim. scores: the same
    of attention whose scores lie in memory. logits: tokens and vocabulary. copies: bytes of plain copies, larger than
    caches. parameters: of an optimizer's pass. collectives: bytes of the whole. beside: a product, and the bytes that
    are gathered beside some of them. to_host: bytes between a device and its host. share_s: seconds for each figure.
    """

    products: tuple[tuple[int, int, int], ...]
    attention: tuple[tuple[int, int, int, int], ...]
    scores: tuple[tuple[int, int, int, int], ...]
    blocks: tuple[BlockSize, ...]
    logits: tuple[tuple[int, int], ...]
    copies: tuple[int, ...]
    parameters: int
    collectives: tuple[int, ...]
    beside: tuple[int, int, int]
    beside_bytes: int
    to_host: tuple[int, ...]
    share_s: float


# Blocks of 1B to 70B models on 4k to 16k tokens, whole and cut along tensor.
GPU = Sizes(
    products=(
        (8192, 4096, 4096),
        (8192, 4096, 14336),
        (8192, 14336, 4096),
        (8192, 4096, 1024),
        (16384, 2048, 2048),
        (16384, 2048, 8192),
        (8192, 8192, 28672),
        (4096, 8192, 1024),
        (4096, 1024, 8192),
        (2048, 4096, 4096),
        (1024, 1024, 1024),
    ),
    attention=((2, 32, 4096, 128), (1, 32, 8192, 128), (8, 16, 2048, 128)),
    scores=((1, 32, 2048, 128), (4, 16, 1024, 128)),
    blocks=(
        BlockSize(d_model=4096, heads=32, kv_heads=8, head_dim=128, feed_forward=14336, sequences=2, sequence=4096),
        BlockSize(d_model=2048, heads=16, kv_heads=8, head_dim=128, feed_forward=8192, sequences=4, sequence=4096),
    ),
    logits=((8192, 32768), (4096, 128256)),
    copies=(256 * MIB, 1024 * MIB),
    parameters=2**28,
    collectives=(64 * KIB, 1 * MIB, 16 * MIB, 128 * MIB, 1024 * MIB),
    beside=(8192, 4096, 4096),
    beside_bytes=1024 * MIB,
    to_host=(16 * MIB, 256 * MIB),
    share_s=0.25,
)

# What a laptop can train: the examples' models and somewhat larger ones.
CPU = Sizes(
    products=(
        (2048, 128, 128),
        (2048, 128, 384),
        (2048, 384, 128),
        (2048, 256, 256),
        (2048, 256, 768),
        (2048, 1024, 1024),
        (256, 512, 1536),
    ),
    attention=((8, 4, 256, 32), (8, 4, 256, 64), (2, 8, 1024, 64)),
    scores=((8, 4, 256, 32), (8, 4, 256, 64)),
    blocks=(
        BlockSize(d_model=128, heads=4, kv_heads=2, head_dim=32, feed_forward=384, sequences=8, sequence=256),
        BlockSize(d_model=256, heads=4, kv_heads=4, head_dim=64, feed_forward=768, sequences=8, sequence=256),
    ),
    logits=((2048, 257), (1024, 8192)),
    copies=(64 * MIB,),
    parameters=2**22,
    collectives=(4 * KIB, 256 * KIB, 1 * MIB, 4 * MIB, 16 * MIB),
    beside=(2048, 256, 768),
    beside_bytes=16 * MIB,
    to_host=(),
    share_s=0.3,
)

QUICK_GPU = msgspec.structs.replace(
    GPU,
    products=GPU.products[:3],
    attention=GPU.attention[:1],
    scores=GPU.scores[1:],
    blocks=GPU.blocks[1:],
    logits=GPU.logits[:1],
    copies=GPU.copies[:1],
    parameters=2**26,
    collectives=(64 * KIB, 1 * MIB, 64 * MIB),
    beside_bytes=256 * MIB,
    to_host=GPU.to_host[1:],
    share_s=0.05,
)
QUICK_CPU = msgspec.structs.replace(
    CPU,
    products=CPU.products[1:4:2],
    attention=CPU.attention[:1],
    scores=CPU.scores[:1],
    blocks=CPU.blocks[:1],
    logits=CPU.logits[:1],
    copies=(16 * MIB,),
    parameters=2**20,
    collectives=(4 * KIB, 1 * MIB),
    beside_bytes=1 * MIB,
    share_s=0.02,
)


# A GPU with less than this has not room for all of them; the largest take 5 GB beside what CUDA and NCCL do.
SMALL_GPU_BYTES = 20e9
SMALL_GPU = msgspec.structs.replace(
    GPU,
    blocks=GPU.blocks[1:],
    logits=GPU.logits[:1],
    copies=GPU.copies[:1],
    parameters=2**26,
    collectives=GPU.collectives[:-1],
    beside_bytes=128 * MIB,
)


def sizes_for(device: Device, *, quick: bool) -> Sizes:
    """Of a device."""
    if device.kind == "cpu":
        return QUICK_CPU if quick else CPU
    if quick:
        return QUICK_GPU
    return SMALL_GPU if device.memory_bytes < SMALL_GPU_BYTES else GPU
