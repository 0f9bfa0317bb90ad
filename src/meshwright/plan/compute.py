"""Seconds of one rank's kernels: a block's and the head's on one microbatch, and the optimizer's."""

import msgspec

from meshwright.plan.kept import BYTES, feed_forward_columns, is_compiled, loss_of, tokens_of, widths_of
from meshwright.plan.part import ROUTED, STATE_BYTES, Cut, Group, Shape
from meshwright.plan.rates import rates_of
from meshwright.plan.ring import ring_seconds
from meshwright.spec import Device, Job, LossKernel, ModelSpec, Precision, Trainer, count_flops
from meshwright.spec.trainer import AttentionKernel

# Passes over tensors of vocabulary width in cross entropy: of each logit in compute precision, and bytes beside.
# Compiled: reads logits for their maximum and sum, again for the gradient, and writes it. Others read the logits and
# write their gradient. Plain, beside: to fp32 (write 4), log-softmax (read 4 twice, write 4), its gradient (zero-fill
# 4, read 4 + 4, write 4), back (read 4). In place: to fp32 (write 4), the maximum (read 4), less it, exponentiated,
# divided by the sum and times the gradient (8 each), the sum (read 4), back (read 4).
LOSS_PASSES: dict[LossKernel, int] = {"compiled": 4, "plain": 2, "in-place": 2}
LOSS_BYTES: dict[LossKernel, float] = {"compiled": 0.0, "plain": 36.0, "in-place": 48.0}
# Over parameters: AdamW's update, and the gradient norm with clipping (predict_optimizer).
UPDATE_PASSES, CLIP_PASSES = 7, 3


# Numbers of a head that fill attention's kernels. Where scores stay out of memory, narrower ones lose this power of
# what is missing (64 numbers: an eighth, as in FlashAttention 2's own figures, arXiv:2307.08691); else all of it.
WHOLE_HEAD, NARROW = 128, 0.2
# Products of scores whose rows do not begin at multiples of so many bytes run beside the matrix units, at the rate of
# fp32: heads of 108 numbers took BigScience's 176B steps 40% longer than heads of 104 or 144 did.
ALIGNED_BYTES = 16
# Passes over attention's scores beside its products, forward and backward: one kernel reads and writes them, and
# backward reads softmax and gradient; operator by operator scaling, masking, softmax in fp32 and back are twelve.
SCORE_PASSES: dict[AttentionKernel, tuple[float, float]] = {"fused-softmax": (2, 3), "plain": (12, 12)}
# Dropout reads, writes, and keeps a byte for each.
DROPPED_PASSES = 2.5


class Passes(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of a piece's kernels in its forward and backward pass.

    weights_s: of the backward pass's, the gradients of matrices that a pass cut in two puts off. Of the forward pass's,
    elementwise_s: all but matrix products and attention; reads_s, reduces_s: products that read what is gathered along
    the tensor axis, and those whose outputs are summed along it; last_s: its last product; attention_s: attention;
    routed_s: routed experts' products. attention_back_s: attention's backward pass.
    """

    forward_s: float = 0.0
    backward_s: float = 0.0
    weights_s: float = 0.0
    elementwise_s: float = 0.0
    reads_s: float = 0.0
    reduces_s: float = 0.0
    last_s: float = 0.0
    routed_s: float = 0.0
    attention_s: float = 0.0
    attention_back_s: float = 0.0


class Elements(msgspec.Struct, frozen=True, kw_only=True):
    """Elements a token that a block's element-wise kernels read and write.

    along: of its D numbers, between attention and the feed-forward part. inside: of heads and feed-forward columns.
    """

    along: float
    inside: float


def fused_elements(model: ModelSpec, *, dense: bool) -> tuple[Elements, Elements]:
    """A block's, forward and backward, fused as torch.compile fuses them.

    Forward: first norm 2D; rotation 2(HE + KE); residual with the second norm 4D; SwiGLU 3F, or GELU 2F; residual 3D.
    Backward: SwiGLU 6F, or GELU 3F; two norms with their residuals 8D; rotation 2(HE + KE). Norms of heads add a
    reading in the forward and two in the backward pass. Each copy of a token to an expert is put in order and back,
    4D in either pass. dense: one of a mixture's first blocks, which have no experts.
    """
    d, gated = model.d_model, model.parts.gated
    f, copies = feed_forward_columns(model, 0 if dense else model.layers)
    rotation, head_norms = rotated_elements(model)
    order = 4 * copies * d
    return (
        Elements(along=9 * d + order, inside=rotation + head_norms + (3 if gated else 2) * f),
        Elements(along=8 * d + order, inside=rotation + 2 * head_norms + (6 if gated else 3) * f),
    )


def rotated_elements(model: ModelSpec) -> tuple[float, float]:
    """What turning queries and keys reads and writes, and what norms of them read."""
    turned = (model.heads + model.kv_heads) * model.head_dim
    if model.latent:
        # Latent attention turns part of each query, and one key for all heads.
        turned = (model.heads + 1) * model.latent.rope_head_dim
    return (2 * turned if model.parts.positions == "rotary" else 0), (turned if model.parts.head_norms else 0)


def eager_elements(model: ModelSpec, trainer: Trainer, *, dense: bool) -> tuple[Elements, Elements]:
    """The same where each operator passes over memory by itself.

    A norm reads and writes D; operator by operator (to fp32, square, mean, scale, back, weigh) it is nine times as
    much. Two residuals: bias, dropout and sum 7D, or plain sums 3D each. GELU with its bias 2F; SwiGLU's activation
    and product 5F. Queries, keys and values are put in order of heads, and attention's output back, 2(HE + 2KE) + 2HE;
    rotation as two products, two halves and a sum of turned and whole, 7(HE + KE). Backward as much again and a half,
    and a norm's weights besides.
    """
    d, parts = model.d_model, model.parts
    f, copies = feed_forward_columns(model, 0 if dense else model.layers)
    rotation, head_norms = rotated_elements(model)
    norm = 2 * d if trainer.fused_norms else 18 * d
    residuals = 7 * d if trainer.dropout else 6 * d
    heads, kv_heads = model.heads * model.head_dim, model.kv_heads * model.head_dim
    along = 2 * norm + residuals + 4 * copies * d
    inside = (5 if parts.gated else 2) * f + 4 * heads + 4 * kv_heads + 3.5 * rotation + 6 * head_norms
    return Elements(along=along, inside=inside), Elements(along=1.5 * along + norm, inside=1.5 * inside)


def elementwise_seconds(job: Job, cut: Cut, *, dense: bool) -> tuple[float, float]:
    """Forward and backward seconds of a block's element-wise work on one microbatch."""
    rates, compiled = rates_of(job.cluster), is_compiled(job)
    both = fused_elements(job.model, dense=dense) if compiled else eager_elements(job.model, job.trainer, dense=dense)
    share = rates.elementwise if compiled else rates.eager
    element_s = tokens_of(job) * BYTES[job.layout.precision] / (job.cluster.device.memory_bytes_per_s * share)
    along = cut.tensor if job.trainer.sequence_parallel else 1
    forward, backward = (element_s * (each.along / along + each.inside / cut.tensor) for each in both)
    return forward, backward


def product_seconds(job: Job, shape: Shape, precision: Precision | None = None) -> float:
    """One forward product of a microbatch with a matrix, or with a rank's stack of experts that divide the copies.

    precision: of a product that is not one of the blocks'.
    """
    device, rates, experts = job.cluster.device, rates_of(job.cluster), job.model.experts
    tokens = rows = tokens_of(job)
    share = rates.matmul
    if len(shape) == 3 and experts:
        # Ranks of the tensor axis each send their own tokens' copies.
        tokens = tokens * experts.per_token / job.layout.tensor
        rows = max(1.0, tokens / shape[0])
        share *= rates.grouped
    outputs, inputs = shape[-2:]
    precision = precision or job.layout.precision
    if precision == "fp8":
        share *= job.trainer.fp8
    edges = 1 + rates.matmul_edge * (1 / rows + 1 / outputs + 1 / inputs)
    return 2 * tokens * outputs * inputs * edges / (device.peak_flops_per_s(precision) * share)


def block_products(job: Job, group: Group) -> dict[str, float]:
    """Seconds of a block's forward products by their kind, in the words of Passes."""
    sums = {"reads_s": 0.0, "reduces_s": 0.0, "last_s": 0.0, "routed_s": 0.0}
    for name, shape in group.shapes.items():
        if len(shape) == 1:
            continue
        seconds, module = product_seconds(job, shape), name.removesuffix(".weight")
        if name.startswith(ROUTED):
            # Beside no transfer along tensor: theirs are the expert axis's.
            sums["routed_s"] += seconds
            continue
        last = module.endswith(".down")
        sums["reduces_s" if last or module.endswith(".output") else "reads_s"] += seconds
        sums["last_s"] += seconds if last else 0.0
    return sums


def block_passes(job: Job, cut: Cut, group: Group) -> Passes:
    """One block on one microbatch."""
    products = block_products(job, group)
    matmul_s = products["reads_s"] + products["reduces_s"] + products["routed_s"]
    attention_s, attention_back_s = attention_seconds(job, cut)
    dense = group is cut.first and cut.dense > 0
    forward_s, backward_s = elementwise_seconds(job, cut, dense=dense)
    return Passes(
        forward_s=matmul_s + attention_s + forward_s,
        backward_s=2 * matmul_s + attention_back_s + backward_s,
        # Experts' products are not put off to a pass of their own.
        weights_s=matmul_s - products["routed_s"],
        elementwise_s=forward_s,
        attention_s=attention_s,
        attention_back_s=attention_back_s,
        **products,
    )


def attention_seconds(job: Job, cut: Cut) -> tuple[float, float]:
    """Forward and backward seconds of one block's attention on one microbatch."""
    device, rates = job.cluster.device, rates_of(job.cluster)
    whole_flops = job.layout.microbatch * count_flops(job.model, job.data.sequence).block_attention
    # Ranks of the context axis have equal parts of what the mask lets through.
    causal_flops = whole_flops * visible_share(job.model, job.data.sequence) / (cut.tensor * job.layout.context)
    peak, narrow = device.peak_flops_per_s(job.layout.plain_precision), min(1.0, job.model.head_dim / WHOLE_HEAD)
    if job.layout.context > 1 and job.layout.context_form == "ring":
        return ring_seconds(job, widths_of(job, cut), causal_flops, narrow**NARROW)
    if shares := rates.attention.get(job.trainer.attention):
        peak *= narrow**NARROW
        return causal_flops / (peak * shares[0]), 2 * causal_flops / (peak * shares[1])
    reached = peak * narrow * rates.scores
    if job.model.head_dim * BYTES[job.layout.precision] % ALIGNED_BYTES and device.peak_fp32_flops_per_s:
        reached = min(reached, device.peak_flops_per_s("fp32") * rates.matmul)
    # Nothing is skipped.
    products_s = whole_flops / (cut.tensor * job.layout.context * reached)
    scores = job.layout.microbatch * job.model.heads / cut.tensor * job.data.sequence**2 / job.layout.context
    pass_s = scores * BYTES[job.layout.precision] / (device.memory_bytes_per_s * rates.eager)
    forward, backward = SCORE_PASSES[job.trainer.attention]
    dropped = DROPPED_PASSES if job.trainer.dropout else 0.0
    return products_s + (forward + dropped) * pass_s, 2 * products_s + (backward + dropped) * pass_s


def visible_share(model: ModelSpec, sequence: int) -> float:
    """Of the full square that the count is over, what the mask lets through: kernels skip the rest."""
    window = min(model.attention_window or sequence, sequence)
    return window * (2 * sequence - window) / (2 * sequence * sequence)


def head_passes(job: Job) -> Passes:
    """Final norm, head and loss on one microbatch; the loss's passes are split in two."""
    device, rates = job.cluster.device, rates_of(job.cluster)
    vocabulary = -(-job.model.vocabulary // job.layout.tensor)
    matmul_s = product_seconds(job, (vocabulary, job.model.d_model), job.layout.plain_precision)
    kernel = loss_of(job)
    logit_bytes = LOSS_BYTES[kernel] + LOSS_PASSES[kernel] * BYTES[job.layout.precision]
    logits = tokens_of(job) * (job.model.vocabulary if job.trainer.whole_logits else vocabulary)
    loss_s = logits * logit_bytes / (device.memory_bytes_per_s * rates.loss)
    return Passes(forward_s=matmul_s + loss_s / 2, backward_s=2 * matmul_s + loss_s / 2, weights_s=matmul_s)


def predict_optimizer(job: Job, local: int) -> float:
    """Seconds of gradient norm, clipping and update of a rank's `local` parameters, and of moving what is offloaded."""
    device, rates, offload = job.cluster.device, rates_of(job.cluster), job.layout.offload
    local_bytes = STATE_BYTES * local
    # AdamW reads parameter, gradient and two moments and writes all but the gradient; SGD has no moments.
    passes = UPDATE_PASSES if job.optimizer.name == "adamw" else 3
    # The norm reads gradients; clipping reads and writes them again.
    clip_passes = CLIP_PASSES if job.optimizer.clip_norm > 0 else 1
    if offload == "parameters":
        # They come for each gather, twice a microbatch; their gradients go after each backward pass.
        moved = 3 * job.layout.accumulation(job.data.global_batch)
        host_s = (passes + clip_passes) * local_bytes / rates.host_update_bytes_per_s
        return host_s + moved * local_bytes / rates.host_link_bytes_per_s
    seconds = passes * local_bytes / (device.memory_bytes_per_s * rates.update)
    clipped_bytes = clip_passes * local * min(STATE_BYTES, job.trainer.gradient_bytes)
    seconds += clipped_bytes / (device.memory_bytes_per_s * rates.clip)
    # Moments come and go with each update.
    return seconds + (4 * local_bytes / rates.host_link_bytes_per_s if offload == "optimizer" else 0.0)


def has_known_peak(device: Device, job: Job) -> bool:
    """Whether step time can be predicted at all."""
    precisions = (job.layout.precision, job.layout.plain_precision)
    return all(device.peak_flops_per_s(precision) > 0 for precision in precisions) and device.memory_bytes_per_s > 0
