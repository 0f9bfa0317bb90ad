"""What a ring of the context axis computes and takes beside what ordinary attention does.

The ring (parallel/ring.py) runs the same kernels on pieces and adds these up in fp32. Documents and windows it computes
plainly in fp32, tile by tile.
"""

from meshwright.plan.kept import BYTES, Widths, is_masked, tokens_of
from meshwright.plan.part import STATE_BYTES, Cut
from meshwright.plan.rates import rates_of
from meshwright.spec import Job

# Scores that the plain kernel holds at once: parallel/pairs.py's own number, which a test compares.
LARGEST_TILE = 2**26
# Of such scores in fp32, how many tensors there are at once: in the backward pass the scores, their chances, and what
# their gradient is made of before and after.
TILES = 4
# What the plain kernel's eager operators read and write of a score, 4 bytes a time. Forward: the product writes it;
# scaling and masking read and write it; log-sum-exp reads it for the maximum, three times more with two writes for the
# sum; less the sum and exponentiated, each read and written; the product reads it. Backward: the first five again;
# less the sum, exponentiated; the other product writes, less the row's sum, times chances, scaled; three products read.
PLAIN_FORWARD_BYTES = 4 * (1 + 2 + 2 + 1 + 5 + 2 + 2 + 1)
PLAIN_BACKWARD_BYTES = 4 * (1 + 2 + 2 + 2 + 2 + 1 + 2 + 3 + 2 + 3)
# Products of a piece's backward pass for each of its forward pass's two, the scores' second run included.
PLAIN_BACKWARD_PRODUCTS = 5 / 2


def ring_seconds(job: Job, widths: Widths, causal_flops: float, filled: float) -> tuple[float, float]:
    """Forward and backward seconds of one block's attention; causal_flops: of its forward pass on one rank; filled: of
    what attention's kernels reach, what they do with heads as wide as these."""
    device, rates = job.cluster.device, rates_of(job.cluster)
    copy_bytes_per_s = device.memory_bytes_per_s * rates.loss
    if not is_masked(job):
        peak = device.peak_flops_per_s(job.layout.plain_precision) * filled
        forward, backward = rates.attention.get(job.trainer.attention, rates.attention["cudnn"])
        merged = [size / copy_bytes_per_s for size in merge_bytes(job, widths)]
        return (
            causal_flops / (peak * forward) + merged[0],
            2 * causal_flops / (peak * backward) + merged[1],
        )
    # A tile is a rectangle, half of whose height is more than the causal past.
    causal_flops *= 1 + tile_rows(job, widths) / job.data.sequence
    # Two products of 2 FLOPs for each number of a head.
    scores = causal_flops / (2 * (widths.query + widths.mixed) / widths.heads)
    products_s = causal_flops / (device.peak_fp32_flops_per_s * rates.matmul)
    return (
        products_s + scores * PLAIN_FORWARD_BYTES / copy_bytes_per_s,
        PLAIN_BACKWARD_PRODUCTS * products_s + scores * PLAIN_BACKWARD_BYTES / copy_bytes_per_s,
    )


def merge_bytes(job: Job, widths: Widths) -> tuple[float, float]:
    """What adding pieces up reads and writes in a forward and in a backward pass, in fp32 passes of their own.

    Of another rank's keys all of a rank's queries see half, or half of them see all: three quarters on average.
    Forward: what there is is scaled, what comes is scaled and added. Backward: gradients of queries are added up; those
    of keys and values, made anew in each turn, are added up and then added to what comes from the rank before.
    """
    size, turns = BYTES[job.layout.precision], 1 + 0.75 * (job.layout.context - 1)
    held = widths.key + widths.value
    forward = turns * widths.mixed * (8 + (size + 4) + 12)
    backward = turns * (widths.query + held) * (8 + size) + job.layout.context * held * (4 + 12)
    return tokens_of(job) * forward, tokens_of(job) * backward


def tile_rows(job: Job, widths: Widths) -> float:
    """Queries that the plain kernel takes at once, of a chunk: half of what a rank has of a sequence."""
    chunk = tokens_of(job) / job.layout.microbatch / 2
    return min(chunk, max(1, LARGEST_TILE // (job.layout.microbatch * widths.heads * chunk)))


def ring_buffer_bytes(job: Job, cut: Cut, widths: Widths) -> float:
    """What the ring holds at most in one block beside what it is given and gives.

    In either pass keys and values twice, at hand and coming. Forward: the output in fp32, and a piece's as the kernel
    gives it and scaled. Backward: queries' gradients in fp32; a piece's gradients; and those of keys and values three
    times in fp32, made, sent and received. A plain piece is a tile: its scores, and keys repeated for all queries.
    """
    size, held = BYTES[job.layout.precision], widths.key + widths.value
    passing, tokens = 2 * held * size, tokens_of(job)
    travelling = widths.query * STATE_BYTES + 3 * held * STATE_BYTES
    if not is_masked(job):
        forward = widths.mixed * (2 * STATE_BYTES + size)
        return tokens * (passing + max(forward, travelling + (widths.query + held) * size))
    window = cut.model.attention_window or job.data.sequence
    rows, chunk = tile_rows(job, widths), tokens / job.layout.microbatch / 2
    tile = job.layout.microbatch * widths.heads * rows * min(chunk, window + rows)
    repeated = tokens / 2 * (widths.query + held) * STATE_BYTES
    return tokens * (passing + travelling) + repeated + TILES * tile * STATE_BYTES
