"""What routing tokens to experts on other ranks costs in one block: exchanges, buffers, and uneven loads."""

from meshwright.plan.collective import build_expert_rings, predict_exchange
from meshwright.plan.kept import BYTES, feed_forward_columns, tokens_of
from meshwright.plan.rates import rates_of
from meshwright.spec import Job

# Tokens of the busiest rank's experts over the mean. Assumed: what balance losses aim at, measured nowhere yet.
EXPERT_LOAD = 1.1


def copies_bytes(job: Job) -> float:
    """One rank's tokens of a microbatch, once for each expert that they are sent to, in compute precision."""
    _, copies = feed_forward_columns(job.model, job.model.layers)
    tokens = tokens_of(job) / job.layout.tensor
    return tokens * copies * job.model.d_model * BYTES[job.layout.precision]


def exchange_seconds(job: Job) -> float:
    """One pass of a block: tokens to their experts and results back, and before that how many they are.

    Backward their gradients go the same ways. Nothing runs beside them.
    """
    if job.layout.expert == 1:
        return 0.0
    ring, _ = build_expert_rings(job.layout, job.cluster)
    rates = rates_of(job.cluster)
    counts_s = predict_exchange(0.0, ring, job.cluster, rates)
    return counts_s + 2 * predict_exchange(copies_bytes(job), ring, job.cluster, rates)


def uneven_seconds(job: Job, routed_s: float) -> float:
    """Waiting for the rank with the busiest experts, whose products take `routed_s` on average."""
    return (EXPERT_LOAD - 1) * routed_s if job.layout.expert > 1 else 0.0


def expert_buffer_bytes(job: Job) -> float:
    """Copies of tokens that are sent, and those that arrive for the busiest rank's experts."""
    return (1 + EXPERT_LOAD) * copies_bytes(job) if job.layout.expert > 1 else 0.0
