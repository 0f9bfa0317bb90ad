"""What one rank computes and copies in a microbatch, piece by piece, in seconds."""

import msgspec

from meshwright.plan.collective import Ring, build_ring, predict_collective
from meshwright.plan.memory import BYTES, STATE_BYTES, local_parameters, parameter_groups
from meshwright.plan.rates import Rates, rates_of
from meshwright.spec import Device, Job, ModelSpec, count_flops

# Passes over tensors of vocabulary width in cross entropy, bytes a logit. Eager, beside reading the logits and writing
# their gradient: to fp32 (write 4), log-softmax (read 4 twice, write 4), its gradient (zero-fill 4, read 4 + 4,
# write 4), back (read 4).
EAGER_LOSS_BYTES = 36
# Compiled: reads logits for their maximum and sum, again for the gradient, and writes it, in compute precision.
COMPILED_LOSS_PASSES = 4


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """One FSDP group with what runs while it is whole: the embedding (root), a block, or the head.

    Seconds for one microbatch. copy_out_s: making the group whole in compute precision, once. copy_in_s: turning
    its gradients into a reduction's input. accumulate_s: adding whole gradients to those kept for a later reduction.
    gather_s, scatter_s, all_reduce_s: its transfers, once.
    """

    forward_s: float
    backward_s: float
    copy_out_s: float
    copy_in_s: float
    accumulate_s: float
    gather_s: float
    scatter_s: float
    all_reduce_s: float


def elementwise_elements(model: ModelSpec) -> tuple[int, int]:
    """Elements a token that a block's element-wise kernels read and write, fused as torch.compile fuses them.

    Forward: first norm 2D; rotation 2(HE + KE); residual with the second norm 4D; SwiGLU 3F; residual 3D.
    Backward: SwiGLU 6F; two norms with their residuals 8D; rotation 2(HE + KE).
    """
    d, f = model.d_model, model.feed_forward
    rotation = 2 * (model.heads + model.kv_heads) * model.head_dim
    return 9 * d + rotation + 3 * f, 8 * d + rotation + 6 * f


def block_seconds(job: Job) -> tuple[float, float]:
    """Forward and backward of one block on one microbatch."""
    device, rates = job.cluster.device, rates_of(job.cluster.device)
    peak = device.peak_flops_per_s(job.layout.precision)
    flops = count_flops(job.model, job.data.sequence)
    sequences, tokens = job.layout.microbatch, job.layout.microbatch * job.data.sequence
    matmul_s = sequences * flops.block_matmul / (peak * rates.matmul)
    # The count is over the full square, kernels skip what the causal mask hides.
    causal_flops = sequences * flops.block_attention / 2
    size = tokens * BYTES[job.layout.precision] / (device.memory_bytes_per_s * rates.elementwise)
    forward_elements, backward_elements = elementwise_elements(job.model)
    return (
        matmul_s + causal_flops / (peak * rates.attention_forward) + forward_elements * size,
        2 * matmul_s + 2 * causal_flops / (peak * rates.attention_backward) + backward_elements * size,
    )


def head_seconds(job: Job) -> tuple[float, float]:
    """Forward and backward of final norm, head and loss on one microbatch; the loss's passes are split in two."""
    device, rates = job.cluster.device, rates_of(job.cluster.device)
    sequences = job.layout.microbatch
    flops = sequences * count_flops(job.model, job.data.sequence).head
    matmul_s = flops / (device.peak_flops_per_s(job.layout.precision) * rates.matmul)
    logits = sequences * job.data.sequence * job.model.vocabulary
    size = BYTES[job.layout.precision]
    logit_bytes = COMPILED_LOSS_PASSES * size if device.kind == "cuda" else EAGER_LOSS_BYTES + 2 * size
    loss_s = logits * logit_bytes / (device.memory_bytes_per_s * rates.loss)
    return matmul_s + loss_s / 2, 2 * matmul_s + loss_s / 2


def build_pieces(job: Job) -> list[Piece]:
    """The model's pieces in the order of the forward pass; needs known peaks."""
    groups = parameter_groups(job.model)
    rates = rates_of(job.cluster.device)
    rings = (build_ring(job.layout, "shard", job.cluster), build_ring(job.layout, "replica", job.cluster))
    block = build_piece(job, groups.block, block_seconds(job), rings, rates)
    root = build_piece(job, groups.root, (0.0, 0.0), rings, rates)
    head = build_piece(job, groups.head, head_seconds(job), rings, rates)
    return [root, *[block] * job.model.layers, head]


def build_piece(
    job: Job, parameters: int, seconds: tuple[float, float], rings: tuple[Ring, Ring], rates: Rates
) -> Piece:
    """A group of `parameters` elements with its copies and transfers."""
    shard, replica = rings
    size = BYTES[job.layout.precision]
    memory_bytes_per_s = job.cluster.device.memory_bytes_per_s
    # A gather arrives in compute precision; one process casts its fp32 masters instead.
    read = size if shard.size > 1 else STATE_BYTES
    # Reductions are fp32. FSDP runs the copy into the reduction's input without other ranks too.
    return Piece(
        forward_s=seconds[0],
        backward_s=seconds[1],
        copy_out_s=parameters * (read + size) / (memory_bytes_per_s * rates.copy_out),
        copy_in_s=parameters * (size + STATE_BYTES) / (memory_bytes_per_s * rates.copy_in),
        # Reads the new gradient and the fp32 sum, writes the sum: a plain pass, as fast as a copy.
        accumulate_s=parameters * (size + 2 * STATE_BYTES) / (memory_bytes_per_s * rates.copy_out),
        gather_s=predict_collective("all_gather", parameters * size, shard, rates) if parameters else 0.0,
        scatter_s=predict_collective("reduce_scatter", parameters * STATE_BYTES, shard, rates) if parameters else 0.0,
        all_reduce_s=predict_collective("all_reduce", parameters * STATE_BYTES / shard.size, replica, rates)
        if parameters
        else 0.0,
    )


def predict_optimizer(job: Job) -> float:
    """Seconds of gradient norm, clipping and update of the fullest rank's part."""
    device, rates = job.cluster.device, rates_of(job.cluster.device)
    local_bytes = STATE_BYTES * local_parameters(job.model, job.layout.shard)
    # AdamW reads parameter, gradient and two moments and writes all but the gradient; SGD has no moments.
    passes = 7 if job.optimizer.name == "adamw" else 3
    update_s = passes * local_bytes / (device.memory_bytes_per_s * rates.update)
    # The norm reads gradients; clipping reads and writes them again.
    clip_passes = 3 if job.optimizer.clip_norm > 0 else 1
    return update_s + clip_passes * local_bytes / (device.memory_bytes_per_s * rates.clip)


def has_known_peak(device: Device, job: Job) -> bool:
    """Whether step time can be predicted at all."""
    return device.peak_flops_per_s(job.layout.precision) > 0 and device.memory_bytes_per_s > 0
