"""Transfers along the tensor axis: what a block, the embedding and the head send, and what of it is exposed.

Activations lie split over the sequence between modules. Attention and the feed-forward part each gather their input
along it and reduce their output back to a part each; the backward pass does the reverse of both. Ranks sum the
gradients of what each of them holds whole: norms, the biases of row layers, key heads that they share.
"""

import msgspec

from meshwright.plan.collective import build_ring, predict_collective
from meshwright.plan.kept import BYTES, tokens_of
from meshwright.plan.part import Cut, Group
from meshwright.plan.rates import rates_of
from meshwright.spec import Job

# The loss over a split vocabulary combines over ranks, fp32 a token: the maximum; then the sum of exponentials and the
# target's logit together.
LOSS_BYTES = (4, 8)


class TensorTransfers(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of a piece's transfers along the tensor axis in one microbatch: exposed in each pass, and hidden.

    last_s: of forward_s, the forward pass's last reduction.
    """

    forward_s: float = 0.0
    backward_s: float = 0.0
    hidden_s: float = 0.0
    last_s: float = 0.0


def move_seconds(job: Job) -> tuple[float, float]:
    """Gathering one microbatch's activations [B, S, D] along the tensor axis, and reducing them to a part each.

    Where norms and residuals are whole on each rank, both together are one all-reduce.
    """
    ring, rates = build_ring(job.layout, "tensor", job.cluster), rates_of(job.cluster)
    whole_bytes = tokens_of(job) * job.model.d_model * BYTES[job.layout.precision]
    if not job.trainer.sequence_parallel:
        half_s = predict_collective("all_reduce", whole_bytes, ring, rates) / 2
        return half_s, half_s
    return (
        predict_collective("all_gather", whole_bytes, ring, rates),
        predict_collective("reduce_scatter", whole_bytes, ring, rates),
    )


def sum_seconds(job: Job, sizes: tuple[int, ...]) -> float:
    """Summing gradients, one parameter at a time, in compute precision."""
    ring, rates = build_ring(job.layout, "tensor", job.cluster), rates_of(job.cluster)
    return sum(predict_collective("all_reduce", size * BYTES[job.layout.precision], ring, rates) for size in sizes)


def block_transfers(job: Job, group: Group, products_s: tuple[float, float]) -> TensorTransfers:
    """One block.

    products_s: forward seconds of the products that read a gathered input, and of those whose output is reduced.
    async_tensor hides each transfer under the product that it feeds or comes from, as far as that lasts; half of
    either kind belongs to attention and half to the feed-forward part, which is close enough for a sum of minima.
    """
    gather_s, scatter_s = move_seconds(job)
    whole_s = 2 * gather_s + 2 * scatter_s
    hidden_s = 0.0
    if job.layout.async_tensor:
        hidden_s = job.trainer.async_tensor * (min(2 * gather_s, products_s[0]) + min(2 * scatter_s, products_s[1]))
    # Backward a gather becomes a reduction, beside the product that gives its input's gradient: as long as forward's.
    exposed_s = whole_s - hidden_s
    return TensorTransfers(
        forward_s=exposed_s,
        backward_s=exposed_s + sum_seconds(job, group.summed),
        hidden_s=2 * hidden_s,
        last_s=scatter_s * (exposed_s / whole_s if whole_s else 0.0),
    )


def end_transfers(job: Job, cut: Cut) -> tuple[TensorTransfers, TensorTransfers]:
    """The embedding, whose outputs are summed and split, and the head, which gathers its input and sums the loss."""
    ring, rates = build_ring(job.layout, "tensor", job.cluster), rates_of(job.cluster)
    gather_s, scatter_s = move_seconds(job)
    sums_s = sum(predict_collective("all_reduce", size * tokens_of(job), ring, rates) for size in LOSS_BYTES)
    return (
        TensorTransfers(forward_s=scatter_s, backward_s=gather_s + sum_seconds(job, cut.root.summed)),
        TensorTransfers(forward_s=gather_s + sums_s, backward_s=scatter_s + sum_seconds(job, cut.head.summed)),
    )
