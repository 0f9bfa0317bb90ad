"""What one block keeps of a microbatch in programs that bring kernels of their own, by what tells them apart.

plan/kept.py counts the operators of this package's blocks, which lie split along the sequence and attend in tiles.
Here norms and residuals may be whole on each rank of the tensor axis, scores may be, and what is dropped is kept. Of
GPT with dropout and scores in memory it comes to the 34 sbh + 5 as^2b bytes of arXiv:2205.05198.
"""

from meshwright.plan.kept import BYTES, local_sequence, tokens_of, widths_of
from meshwright.plan.part import Cut
from meshwright.spec import Experts, Job

# Of attention's kernels, those that have its scores whole in memory.
WHOLE_SCORES = ("fused-softmax", "plain")
# fp32: log-sum-exp of a row of scores, mean and reciprocal root of a norm, probabilities of a router.
WIDE = 4


def has_kernels(job: Job) -> bool:
    """Whether blocks are another program's: what is gathered block by block is counted as this package's operators,
    unless it drops or has scores in memory."""
    trainer = job.trainer
    if job.cluster.device.kind != "cuda":
        return False
    return not (trainer.gathers and trainer.sequence_parallel) or trainer.dropout or trainer.attention in WHOLE_SCORES


def residual_width(job: Job, cut: Cut) -> float:
    """Numbers a token of a state between blocks."""
    return cut.model.d_model / (cut.tensor if job.trainer.sequence_parallel else 1)


def keep_kernels(job: Job, cut: Cut, *, dense: bool, selective: bool) -> float:
    """Bytes that a block keeps of a microbatch. selective: attention's scores are computed again, and nothing else."""
    experts = cut.model.experts
    part = plain_bytes(job, cut) if experts is None or dense else mixture_bytes(job, cut, experts)
    scores = 0.0 if selective else scores_bytes(job, cut)
    return tokens_of(job) * (attention_bytes(job, cut) + part + scores)


def norm_bytes(job: Job, cut: Cut) -> float:
    """A token's, of one norm: its input and output, mean and root; an operator at a time also the input in fp32, and
    scaled in compute precision. The output may have to be kept gathered."""
    size, width = BYTES[job.layout.precision], residual_width(job, cut)
    apart = 0.0 if job.trainer.fused_norms or job.trainer.compiled else WIDE + size
    output = width if job.trainer.regathers else cut.model.d_model
    return width * (size + apart) + output * size + 2 * WIDE * width / cut.model.d_model


def attention_bytes(job: Job, cut: Cut) -> float:
    """A token's: the norm, queries, keys and values, attention's output, and which numbers were dropped after it.

    Queries, keys and values come of one product: rotated ones lie beside it, since values are a part of it.
    """
    w, size = widths_of(job, cut), BYTES[job.layout.precision]
    rotated = w.query + w.key if cut.model.parts.positions == "rotary" else 0.0
    kept = size * (w.query + w.made + w.mixed + rotated)
    return norm_bytes(job, cut) + kept + dropped_bytes(job, cut)


def scores_bytes(job: Job, cut: Cut) -> float:
    """A token's, of attention's scores: their log-sum-exp, or the whole row after softmax, and where scores are dropped
    also which ones, and the row without them."""
    heads, size = cut.model.heads / cut.tensor, BYTES[job.layout.precision]
    if job.trainer.attention not in WHOLE_SCORES:
        return WIDE * heads
    row = job.data.sequence * heads
    # Operator by operator softmax is in fp32, and cast.
    softmax = size if job.trainer.attention == "fused-softmax" else WIDE + size
    return row * (softmax + (1 + size if job.trainer.dropout else 0))


def dropped_bytes(job: Job, cut: Cut) -> float:
    """A token's: a byte for each number of a state that may be dropped."""
    return residual_width(job, cut) if job.trainer.dropout else 0.0


def products_bytes(job: Job, cut: Cut, columns: float) -> float:
    """A token's, of so many columns on this rank: gate and up or up alone, and what goes down; silu's output too where
    its product with up is an operator by itself."""
    gated = cut.model.parts.gated
    tensors = 2 + gated + (gated and not job.trainer.compiled)
    return BYTES[job.layout.precision] * tensors * columns


def plain_bytes(job: Job, cut: Cut) -> float:
    """A token's, of a feed-forward part with its norm."""
    columns = cut.model.feed_forward / cut.tensor
    return norm_bytes(job, cut) + products_bytes(job, cut, columns) + dropped_bytes(job, cut)


def mixture_bytes(job: Job, cut: Cut, experts: Experts) -> float:
    """A token's, of a mixture with its norm: the router's probabilities, and of each of its copies what is sent to an
    expert, its products, and what comes back."""
    copies, size = experts.per_token, BYTES[job.layout.precision]
    kept = norm_bytes(job, cut) + dropped_bytes(job, cut) + 2 * WIDE * experts.count / cut.tensor
    kept += copies * 2 * size * cut.model.d_model / (1 if job.trainer.splits_experts else cut.tensor)
    kept += copies * products_bytes(job, cut, experts.feed_forward / cut.tensor)
    shared = experts.shared * experts.feed_forward / cut.tensor
    return kept + (products_bytes(job, cut, shared) if shared else 0.0)


def passing_bytes(job: Job, cut: Cut) -> float:
    """Gradients on their way through one block of a microbatch, at their most: of its widest product's results, or of
    scores on either side of softmax."""
    model, size = cut.model, BYTES[job.layout.precision]
    most = (3 if model.parts.gated else 2) * model.feed_forward
    if job.trainer.attention in WHOLE_SCORES:
        # Operator by operator also those before the mask.
        tensors = 2 if job.trainer.attention == "fused-softmax" else 3
        most = max(most, tensors * local_sequence(job) * model.heads)
    return tokens_of(job) * size * (most / cut.tensor + 2 * model.d_model)
