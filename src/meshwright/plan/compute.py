"""Seconds of one rank's kernels: a block's and the head's on one microbatch, and the optimizer's."""

import msgspec

from meshwright.plan.activations import BYTES, feed_forward_columns
from meshwright.plan.memory import STATE_BYTES
from meshwright.plan.part import Part, Shape
from meshwright.plan.rates import rates_of
from meshwright.spec import Device, Job, ModelSpec, count_flops

# Passes over tensors of vocabulary width in cross entropy, bytes a logit. Eager, beside reading the logits and writing
# their gradient: to fp32 (write 4), log-softmax (read 4 twice, write 4), its gradient (zero-fill 4, read 4 + 4,
# write 4), back (read 4).
EAGER_LOSS_BYTES = 36
# Compiled: reads logits for their maximum and sum, again for the gradient, and writes it, in compute precision.
COMPILED_LOSS_PASSES = 4


class Passes(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of a piece's kernels in its forward and backward pass.

    Of the forward pass's, elementwise_s: all but matrix products and attention; reads_s, reduces_s: products that
    read what is gathered along the tensor axis, and those whose outputs are summed along it; last_s: its last product.
    """

    forward_s: float = 0.0
    backward_s: float = 0.0
    elementwise_s: float = 0.0
    reads_s: float = 0.0
    reduces_s: float = 0.0
    last_s: float = 0.0


def elementwise_elements(model: ModelSpec) -> tuple[float, float]:
    """Elements a token that the mean block's element-wise kernels read and write, fused as torch.compile fuses them.

    Forward: first norm 2D; rotation 2(HE + KE); residual with the second norm 4D; SwiGLU 3F, or GELU 2F; residual 3D.
    Backward: SwiGLU 6F, or GELU 3F; two norms with their residuals 8D; rotation 2(HE + KE). Norms of heads add a
    reading in the forward and two in the backward pass. What routes tokens to experts is not reckoned.
    """
    d = model.d_model
    dense = model.experts.dense_layers / model.layers if model.experts else 0.0
    columns = (feed_forward_columns(model, 0)[0], feed_forward_columns(model, model.layers)[0])
    f = dense * columns[0] + (1 - dense) * columns[1]
    # Latent attention turns part of each query, and one key for all heads.
    turned = (model.heads + model.kv_heads) * model.head_dim
    if model.latent:
        turned = (model.heads + 1) * model.latent.rope_head_dim
    rotation = 2 * turned if model.parts.positions == "rotary" else 0
    head_norms = turned if model.parts.head_norms else 0
    gated = model.parts.gated
    forward = 9 * d + rotation + head_norms + (3 if gated else 2) * f
    return forward, 8 * d + rotation + 2 * head_norms + (6 if gated else 3) * f


def product_seconds(job: Job, shape: Shape) -> float:
    """One forward product of a microbatch with a matrix, or with a stack of experts that divide the tokens."""
    device, rates, experts = job.cluster.device, rates_of(job.cluster.device), job.model.experts
    tokens = rows = job.layout.microbatch * job.data.sequence
    if len(shape) == 3 and experts:
        tokens *= experts.per_token
        rows = max(1, tokens // experts.count)
    outputs, inputs = shape[-2:]
    edges = 1 + rates.matmul_edge * (1 / rows + 1 / outputs + 1 / inputs)
    return 2 * tokens * outputs * inputs * edges / (device.peak_flops_per_s(job.layout.precision) * rates.matmul)


def block_products(job: Job, part: Part) -> dict[str, float]:
    """Seconds of the mean block's forward products by their kind, in the words of Passes."""
    sums = {"reads_s": 0.0, "reduces_s": 0.0, "last_s": 0.0}
    for count, shapes in part.blocks:
        for name, shape in shapes.items():
            if len(shape) > 1:
                seconds, module = count * product_seconds(job, shape) / job.model.layers, name.removesuffix(".weight")
                last = module.endswith(".down")
                sums["reduces_s" if last or module.endswith(".output") else "reads_s"] += seconds
                sums["last_s"] += seconds if last else 0.0
    return sums


def block_passes(job: Job, part: Part) -> Passes:
    """The mean block on one microbatch."""
    device, rates = job.cluster.device, rates_of(job.cluster.device)
    peak = device.peak_flops_per_s(job.layout.precision)
    sequences, tokens = job.layout.microbatch, job.layout.microbatch * job.data.sequence
    products = block_products(job, part)
    matmul_s = products["reads_s"] + products["reduces_s"]
    attention_flops = sequences * count_flops(job.model, job.data.sequence).block_attention / part.tensor
    causal_flops = attention_flops * visible_share(job.model, job.data.sequence)
    size = tokens * BYTES[job.layout.precision] / (device.memory_bytes_per_s * rates.elementwise) / part.tensor
    forward_elements, backward_elements = elementwise_elements(job.model)
    return Passes(
        forward_s=matmul_s + causal_flops / (peak * rates.attention_forward) + forward_elements * size,
        backward_s=2 * matmul_s + 2 * causal_flops / (peak * rates.attention_backward) + backward_elements * size,
        elementwise_s=forward_elements * size,
        **products,
    )


def visible_share(model: ModelSpec, sequence: int) -> float:
    """Of the full square that the count is over, what the mask lets through: kernels skip the rest."""
    window = min(model.attention_window or sequence, sequence)
    return window * (2 * sequence - window) / (2 * sequence * sequence)


def head_passes(job: Job) -> Passes:
    """Final norm, head and loss on one microbatch; the loss's passes are split in two."""
    device, rates = job.cluster.device, rates_of(job.cluster.device)
    vocabulary = -(-job.model.vocabulary // job.layout.tensor)
    matmul_s = product_seconds(job, (vocabulary, job.model.d_model))
    logits = job.layout.microbatch * job.data.sequence * vocabulary
    size = BYTES[job.layout.precision]
    logit_bytes = COMPILED_LOSS_PASSES * size if device.kind == "cuda" else EAGER_LOSS_BYTES + 2 * size
    loss_s = logits * logit_bytes / (device.memory_bytes_per_s * rates.loss)
    return Passes(forward_s=matmul_s + loss_s / 2, backward_s=2 * matmul_s + loss_s / 2)


def predict_optimizer(job: Job, part: Part) -> float:
    """Seconds of gradient norm, clipping and update of the fullest rank's part."""
    device, rates = job.cluster.device, rates_of(job.cluster.device)
    local_bytes = STATE_BYTES * part.local
    # AdamW reads parameter, gradient and two moments and writes all but the gradient; SGD has no moments.
    passes = 7 if job.optimizer.name == "adamw" else 3
    update_s = passes * local_bytes / (device.memory_bytes_per_s * rates.update)
    # The norm reads gradients; clipping reads and writes them again.
    clip_passes = 3 if job.optimizer.clip_norm > 0 else 1
    return update_s + clip_passes * local_bytes / (device.memory_bytes_per_s * rates.clip)


def has_known_peak(device: Device, job: Job) -> bool:
    """Whether step time can be predicted at all."""
    return device.peak_flops_per_s(job.layout.precision) > 0 and device.memory_bytes_per_s > 0
