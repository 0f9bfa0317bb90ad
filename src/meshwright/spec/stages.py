"""Which blocks each pipeline stage holds."""

from bisect import bisect_right
from itertools import accumulate, pairwise

from meshwright.spec.count import active_elements, count_flops
from meshwright.spec.layout import Layout
from meshwright.spec.model import ModelSpec
from meshwright.spec.schedule import held_stages, stage_count

# What a byte costs that the embedding moves, in FLOPs that a device does meanwhile: an H100's 989.4 TFLOP/s in bf16
# over its 3.35 TB/s (datasheets in spec/devices.py). An A100's is 153, an H200's 206; it is a small part in each.
EMBEDDING_FLOPS_PER_BYTE = 295
# Seconds of the head's FLOPs, its loss with them, against as many of a block's: one large product reaches 750 TFLOP/s
# where blocks reach 500 with all that is around their products (llama-1b-untied in two stages of 10 and 6 blocks, two
# H200s, torch 2.11, 2026-11-23: 61 ms a block and 137 ms the head for 65,536 tokens).
HEAD_SHARE = 0.67
# Bytes a token and column that it moves: reads a row and writes it in bf16, reads its gradient, reads and writes fp32.
EMBEDDING_BYTES = 2 + 2 + 2 + 4 + 4
# Forward passes that a block costs: one, and a backward pass, which has two products for each of the forward's.
PASSES = 3.0


def block_flops(model: ModelSpec, sequence: int) -> list[float]:
    """FLOPs of each block's forward pass over a sequence.

    Attention is counted over the full square: its kernels do half of that, at about half the rate of plain products.
    """
    attention = count_flops(model, sequence).block_attention
    dense = model.experts.dense_layers if model.experts else 0
    first, last = (2.0 * sequence * active_elements(model, layer) + attention for layer in (0, model.layers - 1))
    return [first] * dense + [last] * (model.layers - dense)


def rank_flops(model: ModelSpec, layout: Layout, sequence: int, rank: int) -> float:
    """Training FLOPs of a sequence in the stages of one rank along pipeline, by themselves: useful work."""
    stages, forward = stage_blocks(model, layout, sequence), block_flops(model, sequence)
    held = held_stages(layout, rank)
    flops = sum(forward[layer] for stage in held for layer in stages[stage])
    head = count_flops(model, sequence).head if stage_count(layout) - 1 in held else 0
    return PASSES * (flops + head)


def stage_costs(model: ModelSpec, layout: Layout, sequence: int) -> tuple[list[float], float, float]:
    """Training FLOPs of each block, one that is computed again with that; and what the embedding costs, and the head
    with its loss, in FLOPs of a block."""
    again = layout.recomputed_layers(model.layers)
    blocks = [(PASSES + (layer < again)) * each for layer, each in enumerate(block_flops(model, sequence))]
    head = count_flops(model, sequence).head
    embedding = sequence * model.d_model * EMBEDDING_BYTES * EMBEDDING_FLOPS_PER_BYTE
    return blocks, float(embedding), PASSES * HEAD_SHARE * head


def split_layers(model: ModelSpec, layout: Layout, sequence: int) -> tuple[int, ...]:
    """Blocks of each stage, first to last: `layout.stage_layers`, or what makes the slowest stage fastest.

    Of the splits that do, one that is close to even. For layouts that check_schedule lets through.
    """
    if layout.stage_layers:
        return layout.stage_layers
    stages = stage_count(layout)
    if stages == 1:
        return (model.layers,)
    blocks, first, last = stage_costs(model, layout, sequence)
    # Both ends lie beside blocks and can be counted as part of them.
    ends = [first + blocks[0], *blocks[1:-1], blocks[-1] + last] if len(blocks) > 1 else [first + blocks[0] + last]
    sums = [0.0, *accumulate(ends)]
    return spread(sums, stages, slowest_stage(sums, stages))


def stage_blocks(model: ModelSpec, layout: Layout, sequence: int) -> list[range]:
    """The blocks of each stage, first to last."""
    ends = accumulate(split_layers(model, layout, sequence), initial=0)
    return [range(start, stop) for start, stop in pairwise(ends)]


def slowest_stage(sums: list[float], stages: int) -> float:
    """The least that the costliest of `stages` runs of blocks can cost; sums: of the blocks before each."""
    single = max(end - start for start, end in pairwise(sums))
    low, high = max(single, sums[-1] / stages) * (1 - 1e-9), sums[-1]
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if furthest_ends(sums, stages, middle)[-1] == len(sums) - 1 else (middle, high)
    return high


def furthest_ends(sums: list[float], stages: int, limit: float) -> list[int]:
    """Blocks that no stage, the first one, the first two and so on can hold, each stage within `limit`."""
    ends = [0]
    for _ in range(stages):
        within = sums[ends[-1]] + limit * (1 + 1e-9)
        ends.append(bisect_right(sums, within) - 1)
    return ends


def spread(sums: list[float], stages: int, limit: float) -> tuple[int, ...]:
    """Blocks of each stage, none above `limit`, each as near as can be to an equal part of what is left.

    From the last stage to the first: the head is what an equal part can be too small for.
    """
    furthest = furthest_ends(sums, stages, limit)
    split: list[int] = []
    end = len(sums) - 1
    for before in range(stages - 1, 0, -1):
        part = sums[end] / (before + 1)
        if sums[1] > part:
            # So is the first stage, with one block: the others share the rest.
            part = (sums[end] - sums[1]) / before
        # One block at least here and in each stage before, and no more before than they can hold.
        begins = [b for b in range(before, min(furthest[before], end - 1) + 1) if fits(sums, b, end, limit)]
        begin = min(begins, key=lambda begin: abs(sums[end] - sums[begin] - part))
        split.append(end - begin)
        end = begin
    return (end, *reversed(split))


def fits(sums: list[float], begin: int, end: int, limit: float) -> bool:
    """Whether blocks from `begin` up to `end` cost no more than `limit`."""
    return sums[end] - sums[begin] <= limit * (1 + 1e-9)
