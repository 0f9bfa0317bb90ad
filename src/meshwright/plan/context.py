"""Transfers along the context axis in one block: keys and values around a ring, or heads exchanged for tokens."""

from meshwright.plan.collective import build_ring, predict_exchange
from meshwright.plan.compute import Passes
from meshwright.plan.kept import BYTES, tokens_of, widths_of
from meshwright.plan.part import STATE_BYTES, Cut
from meshwright.plan.rates import rates_of
from meshwright.plan.ring import ring_buffer_bytes
from meshwright.spec import Job

# Tensors of the exchanged size that there are at once: in the backward pass what is to be sent, its late chunks in
# order, all put in the order of ranks, that laid out anew, and what is received.
EXCHANGE_COPIES = 4.5


def context_transfers(job: Job, cut: Cut, passes: Passes) -> tuple[tuple[float, float], tuple[float, float]]:
    """Seconds (exposed, hidden) of a block's forward and of its backward pass on one microbatch."""
    if job.layout.context == 1:
        return (0.0, 0.0), (0.0, 0.0)
    return ring_transfers(job, cut, passes) if job.layout.context_form == "ring" else exchange_transfers(job, cut)


def ring_transfers(job: Job, cut: Cut, passes: Passes) -> tuple[tuple[float, float], tuple[float, float]]:
    """Each rank sends on the keys and values it has while it attends to them; backward their fp32 gradients as well.

    These end at home, so they make one step more.
    """
    size, widths, rates = job.layout.context, widths_of(job, cut), rates_of(job.cluster)
    numbers = tokens_of(job) * (widths.key + widths.value)
    # All send at once, so a step lasts as long as its slowest hop: between nodes through the sender's own port.
    ring = build_ring(job.layout, "context", job.cluster)
    link = job.cluster.inter if ring.nodes > 1 else job.cluster.intra

    def send_s(size_bytes: float) -> float:
        return size_bytes / (link.bytes_per_s * rates.links["send"]) + link.latency_s

    forward_s = send_s(numbers * BYTES[job.layout.precision])
    home_s = send_s(numbers * STATE_BYTES)
    backward_s = forward_s + home_s
    steps = size - 1
    hidden = [
        min(step_s, attending_s / size) if rates.overlaps else 0.0
        for step_s, attending_s in (
            (forward_s, passes.attention_s),
            (backward_s, passes.attention_back_s),
        )
    ]
    return (
        (steps * (forward_s - hidden[0]), steps * hidden[0]),
        (steps * (backward_s - hidden[1]) + home_s, steps * hidden[1]),
    )


def exchange_transfers(job: Job, cut: Cut) -> tuple[tuple[float, float], tuple[float, float]]:
    """Queries, keys and values are exchanged before attention and its output after it; backward their gradients.

    The first three travel together. Nothing runs beside it.
    """
    widths, rates = widths_of(job, cut), rates_of(job.cluster)
    ring = build_ring(job.layout, "context", job.cluster)
    tokens_bytes = tokens_of(job) * BYTES[job.layout.precision]
    pass_s = sum(
        predict_exchange(width * tokens_bytes, ring, job.cluster, rates) for width in (widths.sent, widths.mixed)
    )
    return (pass_s, 0.0), (pass_s, 0.0)


def context_buffer_bytes(job: Job, cut: Cut) -> float:
    """What one block holds, at most, beside what attention is given and gives."""
    if job.layout.context == 1:
        return 0.0
    widths = widths_of(job, cut)
    if job.layout.context_form == "ring":
        return ring_buffer_bytes(job, cut, widths)
    return EXCHANGE_COPIES * tokens_of(job) * widths.sent * BYTES[job.layout.precision]
