"""Bytes that a rank keeps from the forward to the backward pass, by recompute policy, and the loss's tensors.

Letters as in ModelSpec. Along the tensor axis norms and residuals lie split over the sequence, what column layers
read is gathered and whole, and heads and feed-forward columns are this rank's part.
"""

import msgspec

from meshwright.plan.part import Part
from meshwright.spec import Job, ModelSpec, Precision

BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2}


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """What one token leaves behind in one block: elements in compute precision, and numbers that are always fp32."""

    elements: float
    fp32: float

    def bytes_at(self, precision: Precision) -> float:
        """Both together."""
        return self.elements * BYTES[precision] + 4 * self.fp32


class Widths(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers a token on one rank. split: D where the sequence is split; whole: D where it is gathered.

    query, key, value, mixed: attention's inputs and output, heads and their numbers together; made: keys and values as
    computed, of which a rank that shares heads with others looks at one. heads, kv_heads: how many of them. low_rank:
    what latent attention goes down to.
    """

    split: float
    whole: float
    query: float
    key: float
    value: float
    mixed: float
    made: float
    heads: float
    kv_heads: float
    low_rank: float


def widths_of(part: Part) -> Widths:
    """What the rank's part of each sequence is as wide as."""
    model, tensor = part.model, part.tensor
    heads, kv_heads = model.heads / tensor, max(1, model.kv_heads / tensor)
    # Where there are fewer key heads than ranks, each rank computes all of them.
    made = kv_heads if model.kv_heads % tensor == 0 else model.kv_heads
    latent = model.latent
    positions = latent.rope_head_dim if latent else 0
    value = latent.value_head_dim if latent else model.head_dim
    return Widths(
        split=model.d_model / tensor,
        whole=model.d_model,
        query=heads * (model.head_dim + positions),
        key=kv_heads * (model.head_dim + positions),
        value=kv_heads * value,
        mixed=heads * value,
        made=made * (model.head_dim + positions + value),
        heads=heads,
        kv_heads=kv_heads,
        low_rank=latent.query_rank + latent.kv_rank + latent.rope_head_dim if latent else 0,
    )


def feed_forward_columns(model: ModelSpec, layer: int) -> tuple[float, float]:
    """Of one block, whole: columns of the feed-forward parts that a token runs through, and its copies to experts."""
    experts = model.experts
    if experts is None or layer < experts.dense_layers:
        return model.feed_forward, 0
    return (experts.per_token + experts.shared) * experts.feed_forward, experts.per_token


def mean_block(part: Part, *, selective: bool, compiled: bool) -> Saved:
    """What the mean block keeps for its backward pass, nothing recomputed or all but products and attention."""
    keep = keep_products if selective else keep_all
    model = part.model
    others = keep(part, *feed_forward_columns(model, model.layers), compiled=compiled)
    if not model.experts or not model.experts.dense_layers:
        return others
    first = keep(part, *feed_forward_columns(model, 0), compiled=compiled)
    share = model.experts.dense_layers / model.layers
    return Saved(
        elements=share * first.elements + (1 - share) * others.elements,
        fp32=share * first.fp32 + (1 - share) * others.fp32,
    )


def keep_all(part: Part, columns: float, copies: float, *, compiled: bool) -> Saved:
    """One block, nothing recomputed.

    Inputs of the two norms 2D; their outputs, which the projections keep (gathered: whole), 2D; queries and attention's
    output 2HE; keys and values 2KE; gate, up and their product 3F, or in a plain feed-forward part 2F; norms of heads
    HE + KE; the results of latent attention's products to low ranks, and their norms; each expert's input and output.
    Eager code on a CPU keeps besides: RMSNorm's scaled inputs, silu's output F, and attention's output once more with
    heads innermost HE (where queries are rotated and so laid out anew); a test holds that sum to the built model.
    """
    model, w, f = part.model, widths_of(part), columns / part.tensor
    family = model.parts
    kept = 2 * w.split + 2 * w.whole + w.query + w.key + w.value + w.mixed + (3 if family.gated else 2) * f
    kept += 2 * w.low_rank + 2 * copies * w.whole
    # Attention's log-sum-exp; norms' reciprocal roots, and LayerNorm's means.
    fp32 = w.heads + (2 if family.norm == "rms" else 4) / part.tensor
    if family.head_norms:
        kept += w.query + w.key
        fp32 += w.heads + w.kv_heads
    if not compiled:
        kept += (w.mixed if family.positions == "rotary" else 0) + (f if family.gated else 0)
        kept += 2 * w.split if family.norm == "rms" else 0
        kept += w.query + w.key if family.head_norms else 0
    return Saved(elements=kept, fp32=fp32)


def keep_products(part: Part, columns: float, copies: float, *, compiled: bool) -> Saved:
    """One block, recomputed but for the results of matrix products, attention and transfers.

    The block's input and the state after attention 2D; queries, keys, values and attention's output; gate and up 2F,
    or up alone; where ranks divide a sequence, what they gathered, 2D. Eager code keeps every such result, needed or
    not: the last product's D, and of ranks that divide a sequence the sums before their reduction, 2D.
    """
    model, w, f = part.model, widths_of(part), columns / part.tensor
    kept = 2 * w.split + w.query + w.made + w.mixed + (2 if model.parts.gated else 1) * f
    kept += w.low_rank + copies * w.whole
    kept += 2 * w.whole if part.tensor > 1 else 0
    if not compiled:
        kept += w.split + (2 * w.whole if part.tensor > 1 else 0)
    return Saved(elements=kept, fp32=w.heads)


def activation_bytes(job: Job, part: Part) -> float:
    """Tensors kept from the forward to the backward pass of one microbatch, or while a block runs again, if more.

    While the last recomputed block runs again, the blocks after it and the loss are done and their tensors gone.
    """
    layout, model = job.layout, job.model
    compiled = job.cluster.device.kind == "cuda"
    size, layers, tokens = BYTES[layout.precision], model.layers, layout.microbatch * job.data.sequence
    # Attention adds a mask in numbers to its scores, and each block keeps its own; a GPU's skips tiles by a short list.
    mask = 0 if compiled else mask_elements(job)
    whole = tokens * mean_block(part, selective=False, compiled=compiled).bytes_at(layout.precision) + size * mask
    if layout.recompute == "selective":
        kept = layers * tokens * mean_block(part, selective=True, compiled=compiled).bytes_at(layout.precision) + mask
        again = kept + whole - (kept - mask) / layers
    else:
        recomputed = layout.recomputed_layers(layers)
        # With the first block's input stays what all blocks are given: the mask in booleans, a byte each.
        inputs = recomputed * tokens * size * model.d_model / part.tensor + (mask if recomputed else 0)
        kept = inputs + (layers - recomputed) * whole
        again = inputs + whole if recomputed else 0.0
    return max(kept, again - logits_bytes(job)) + tokens * outside_bytes(job, part) + tables_bytes(job)


def mask_elements(job: Job) -> int:
    """Of the table of what each token sees of the others; 0 where it sees all of the past."""
    square = job.data.sequence**2
    if job.data.attention == "document":
        return job.layout.microbatch * square
    return square if 0 < job.model.attention_window < job.data.sequence else 0


def outside_bytes(job: Job, part: Part) -> float:
    """Bytes a token beside the blocks.

    The embedding keeps its int64 tokens, and of a split vocabulary those in the rank's part (its output is the first
    block's input, counted there); the final norm its input and a root (LayerNorm a mean as well), in eager code on a
    CPU also its input scaled; the head the norm's output, gathered.
    """
    rms = job.model.parts.norm == "rms"
    split = job.model.d_model / part.tensor
    norms = split + (split if rms and job.cluster.device.kind == "cpu" else 0) + job.model.d_model
    tokens = 8 if part.tensor == 1 else 16
    return tokens + norms * BYTES[job.layout.precision] + (4 if rms else 8) / part.tensor


def tables_bytes(job: Job) -> float:
    """cos and sin in fp32, or int64 positions, once for all blocks; for all sequences too, unless each counts from its
    own documents' starts."""
    places = job.data.sequence * (job.layout.microbatch if job.data.attention == "document" else 1)
    if job.model.parts.positions == "learned":
        return 8.0 * places
    rotated = job.model.latent.rope_head_dim if job.model.latent else job.model.head_dim
    return 2 * places * rotated // 2 * 4.0


def logits_bytes(job: Job) -> float:
    """The loss's tensors of vocabulary width at their peak, in the backward pass through fp32 cross entropy.

    Eager: the saved log-probabilities, the gradient with respect to them, and the gradient with respect to the fp32
    logits that is computed from both. (The forward pass holds less: logits, their fp32 copy, log-probabilities.)
    Compiled: the logits and their gradient, both in the compute precision; no fp32 copy is ever whole in memory. On
    an H200 the allocated peak of benchmarks/training_gpu.py less everything else leaves 3.8 bytes a logit.
    """
    # The first ranks of a vocabulary that does not divide have a row more.
    vocabulary = -(-job.model.vocabulary // job.layout.tensor)
    elements = job.layout.microbatch * job.data.sequence * vocabulary
    compiled = job.cluster.device.kind == "cuda"
    return float(elements * (2 * BYTES[job.layout.precision] if compiled else 3 * 4))
