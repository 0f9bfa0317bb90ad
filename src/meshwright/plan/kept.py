"""What one block keeps from its forward to its backward pass, by recompute policy.

Letters as in ModelSpec. Along the context axis a rank has its part of each sequence. Along the tensor axis norms and
residuals lie split over that part, what column layers read is gathered and whole, and heads and feed-forward columns
are this rank's; routed experts are given tokens as they lie split.
"""

from math import lcm

import msgspec

from meshwright.plan.part import Cut
from meshwright.spec import SPLIT_BACKWARD, Experts, Job, LossKernel, ModelSpec, Precision

# Of numbers between products: in fp8 only what a product reads is as narrow, and for as long as it runs.
BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp8": 2}


def is_compiled(job: Job) -> bool:
    """Whether blocks are compiled: on accelerators, where the trainer does, unless backward passes are cut in two,
    which a compiled one is not."""
    compiles = job.cluster.device.is_accelerator and job.trainer.compiled
    return compiles and job.layout.schedule not in SPLIT_BACKWARD


def loss_of(job: Job) -> LossKernel:
    """The trainer's, which is compiled by itself; on a CPU nothing is."""
    return job.trainer.loss if job.cluster.device.is_accelerator else "plain"


def local_sequence(job: Job) -> int:
    """Tokens of each sequence on a rank of the context axis."""
    return job.data.sequence // job.layout.context


def tokens_of(job: Job) -> int:
    """Tokens of a microbatch on a rank of the context axis."""
    return job.layout.microbatch * local_sequence(job)


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """What one token leaves behind in a part of a block: elements in compute precision, and numbers of four bytes."""

    elements: float = 0.0
    wide: float = 0.0

    def __add__(self, other: "Saved") -> "Saved":
        return Saved(elements=self.elements + other.elements, wide=self.wide + other.wide)

    def bytes_at(self, precision: Precision) -> float:
        """Both together."""
        return self.elements * BYTES[precision] + 4 * self.wide


class Widths(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers a token on one rank. split: D where the sequence is split; whole: D where it is gathered.

    query, key, value, mixed: attention's inputs and output, heads and their numbers together; made: keys and values as
    computed, of which a rank that shares heads with others looks at one; sent: queries, keys and values as they are
    exchanged for whole sequences. heads, kv_heads: how many of them. low_rank: what latent attention goes down to.
    """

    split: float
    whole: float
    query: float
    key: float
    value: float
    mixed: float
    made: float
    sent: float
    heads: float
    kv_heads: float
    low_rank: float


def widths_of(job: Job, cut: Cut) -> Widths:
    """What the rank's part of each sequence is as wide as."""
    model, tensor = cut.model, cut.tensor
    heads, kv_heads = model.heads / tensor, max(1, model.kv_heads // tensor)
    # Where there are fewer key heads than ranks, each rank computes all of them.
    made = kv_heads if model.kv_heads % tensor == 0 else model.kv_heads
    latent = model.latent
    positions = latent.rope_head_dim if latent else 0
    value = latent.value_head_dim if latent else model.head_dim
    query, key_value = heads * (model.head_dim + positions), model.head_dim + positions + value
    return Widths(
        split=model.d_model / tensor,
        whole=model.d_model,
        query=query,
        key=kv_heads * (model.head_dim + positions),
        value=kv_heads * value,
        mixed=heads * value,
        made=made * key_value,
        # Key heads are repeated until the ranks of context divide them.
        sent=query + lcm(kv_heads, job.layout.context) * key_value,
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


def keep_block(job: Job, cut: Cut, *, dense: bool, selective: bool) -> float:
    """Bytes that a block keeps of a microbatch, nothing recomputed or all but products, attention and transfers.

    dense: one of a mixture's first blocks, which have no experts. Of experts that are divided over ranks, the mean
    rank's: who gets how many tokens cannot be known. A test holds all of it to the built model.
    """
    attention, plain = (products_attention, products_plain) if selective else (all_attention, all_plain)
    if selective and job.trainer.selective == "half-products":
        attention, plain = half_attention, half_plain
    kept, constant, experts = attention(job, cut), keep_load(cut, dense=dense), cut.model.experts
    if experts is None or dense:
        kept += plain(job, cut, cut.model.feed_forward)
    else:
        kept += (products_mixture if selective else all_mixture)(job, cut, experts)
        if experts.balance_loss and not selective:
            # Each sequence's share of tokens that each expert has, and its tokens.
            constant += 4 * job.layout.microbatch * (experts.count + 1)
        if selective and job.layout.expert > 1:
            # The counts that come from other ranks are the result of a transfer.
            constant += 8 * experts.count
        if selective and experts.balance_loss:
            # So are each sequence's, summed along an axis that has other parts of it.
            axes = (job.layout.context > 1) + (cut.tensor > 1)
            constant += 8 * axes * job.layout.microbatch * experts.count
    return tokens_of(job) * kept.bytes_at(job.layout.precision) + constant


def keep_load(cut: Cut, *, dense: bool) -> float:
    """Bytes that a mixture keeps of a microbatch whatever is recomputed: each expert's count of tokens (int64), and
    the balance loss."""
    experts = cut.model.experts
    return 0.0 if experts is None or dense else 8.0 * experts.count + 4


def is_exchanged(job: Job) -> bool:
    """Whether attention is given whole sequences, by exchange."""
    return job.layout.context > 1 and job.layout.context_form == "all-to-all"


def is_masked(job: Job) -> bool:
    """Whether tokens see less than all of the past."""
    return job.data.attention == "document" or 0 < job.model.attention_window < job.data.sequence


# --- Nothing recomputed ----------------------------------------------------------------------------------------------


def all_norm(job: Job, cut: Cut) -> Saved:
    """A norm's input D', and reciprocal roots (LayerNorm: means as well); eager RMSNorm also keeps its scaled input."""
    rms = cut.model.parts.norm == "rms"
    split = cut.model.d_model / cut.tensor
    return Saved(elements=2 * split if rms and not is_compiled(job) else split, wide=(1 if rms else 2) / cut.tensor)


def all_attention(job: Job, cut: Cut) -> Saved:
    """Attention with its norm.

    The norm's output, which the projections keep (gathered: whole), D; queries and attention's output 2HE; keys and
    values 2KE; attention's log-sum-exp; norms of heads HE + KE; the results of latent attention's products to low
    ranks, and their norms. Where heads are exchanged for tokens: what was exchanged, and attention's output before and
    after its exchange.
    """
    model, w, compiled = cut.model, widths_of(job, cut), is_compiled(job)
    kept, wide = w.whole + w.mixed + 2 * w.low_rank, w.heads
    if is_exchanged(job):
        kept += w.sent + w.mixed
    else:
        # Values stay in what was computed, where ranks share heads more than they look at; keys are turned out of it.
        kept += w.query + w.key + w.made * w.value / (w.key + w.value)
    if model.parts.head_norms:
        kept += (w.query + w.key) * (1 if compiled else 2)
        wide += w.heads + w.kv_heads
    return all_norm(job, cut) + Saved(elements=kept, wide=wide)


def all_products(job: Job, cut: Cut, columns: float) -> Saved:
    """Gate, up and their product 3F, or in a plain feed-forward part 2F; eager code keeps silu's output too."""
    gated = cut.model.parts.gated
    tensors = 2 + gated + (gated and not is_compiled(job))
    return Saved(elements=tensors * columns / cut.tensor)


def all_plain(job: Job, cut: Cut, columns: float) -> Saved:
    """A feed-forward part with its norm, the output of which is gathered: D."""
    return all_norm(job, cut) + Saved(elements=cut.model.d_model) + all_products(job, cut, columns)


def all_mixture(job: Job, cut: Cut, experts: Experts) -> Saved:
    """A mixture with its norm, the output of which goes to the experts as it lies split, and gathered to shared ones.

    The routed part is never compiled. Each copy of a token: the expert's input and output 2D; gate, silu's output, up
    and their product 4F; its weight, also before weights are normalised; which expert, and in what order (int64), on
    both sides of an exchange. Each token: scores of all experts in fp32, and sums that they or weights are divided by.
    """
    split, copies = cut.model.d_model / cut.tensor, experts.per_token / cut.tensor
    kept = split + copies * (2 * cut.model.d_model + 4 * experts.feed_forward + 1)
    wide = experts.count / cut.tensor + 4 * copies + (2 * copies if job.layout.expert > 1 else 0)
    wide += copies + 1 / cut.tensor if experts.normalised else 0
    wide += 1 / cut.tensor if experts.balance_loss and cut.model.parts.scores == "sigmoid" else 0
    saved = all_norm(job, cut) + Saved(elements=kept, wide=wide)
    if experts.shared:
        saved += all_products(job, cut, experts.shared * experts.feed_forward)
        saved += Saved(elements=cut.model.d_model if cut.tensor > 1 else 0)
    return saved


# --- Recomputed but for the results of matrix products, attention and transfers --------------------------------------


def products_attention(job: Job, cut: Cut) -> Saved:
    """The block's input and the state after attention 2D; queries, keys, values and attention's output; where ranks
    divide a sequence, what they gathered, D. Where heads are exchanged for tokens, what came of both exchanges.

    Eager code keeps every such result, needed or not: of ranks that divide a sequence the sums before their reduction,
    and what was sent of what came.
    """
    w, compiled = widths_of(job, cut), is_compiled(job)
    kept = 2 * w.split + w.mixed + w.low_rank
    kept += w.sent + w.mixed if is_exchanged(job) else 0
    kept += w.query + w.made if not (compiled and is_exchanged(job)) else 0
    if cut.tensor > 1:
        kept += w.whole * (1 if compiled else 2)
    return Saved(elements=kept, wide=w.heads)


def products_plain(job: Job, cut: Cut, columns: float) -> Saved:
    """Gate and up 2F, or up alone; along tensor what was gathered, D. Eager: the last product's D, summed and not."""
    model, compiled = cut.model, is_compiled(job)
    kept = (2 if model.parts.gated else 1) * columns / cut.tensor
    kept += 0 if compiled else model.d_model / cut.tensor
    if cut.tensor > 1:
        kept += model.d_model * (1 if compiled else 2)
    return Saved(elements=kept)


def products_mixture(job: Job, cut: Cut, experts: Experts) -> Saved:
    """What the routed part is given, D and logits; each copy's gate and up 2F and output D, the sort by experts in two
    int64, and what exchanges brought either way, where there is a sort on both sides. Shared experts as a feed-forward
    part, for which eager code also keeps what it is added to, 2D."""
    split, copies = cut.model.d_model / cut.tensor, experts.per_token / cut.tensor
    exchanged = 2 if job.layout.expert > 1 else 0
    kept = split + experts.count / cut.tensor
    kept += copies * (2 * experts.feed_forward + (1 + exchanged) * cut.model.d_model)
    saved = Saved(elements=kept, wide=4 * copies * (2 if exchanged else 1))
    if experts.shared:
        saved += products_plain(job, cut, experts.shared * experts.feed_forward)
        saved += Saved(elements=0 if is_compiled(job) else 2 * split)
    return saved


# --- The same, but of products each second one ------------------------------------------------------------------------


def half_attention(job: Job, cut: Cut) -> Saved:
    """The block's input D; queries and values, first and third product; attention's output; what ranks gathered, D."""
    w = widths_of(job, cut)
    kept = w.split + w.query + w.value + w.mixed
    return Saved(elements=kept + (w.whole if cut.tensor > 1 else 0), wide=w.heads)


def half_plain(job: Job, cut: Cut, columns: float) -> Saved:
    """Gate, the fifth product; eager code also keeps the last, needed or not. What ranks gathered, D."""
    model = cut.model
    kept = columns / cut.tensor + (0 if is_compiled(job) else model.d_model / cut.tensor)
    return Saved(elements=kept + (model.d_model if cut.tensor > 1 else 0))
