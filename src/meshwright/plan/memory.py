"""Predicted bytes per rank, term by term. docs/planning.md has the table of what each zero holds whole."""

from math import ceil, prod

import msgspec

from meshwright.account import MemoryAccount
from meshwright.spec import Job, ModelSpec, Precision, block_shapes, count_parameters, parameter_shapes

BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2}
# Masters, reduced gradients and optimizer states are fp32 in every precision (spec.Layout).
STATE_BYTES = 4

# Device context with PyTorch's kernels, and NCCL's channels on top of it: 1.4 GB on one H200 and 3.3 GB on each of two
# (memory account of benchmarks/training_gpu.py, `framework`, torch 2.11, 2026-11-22).
CONTEXT_BYTES = 1.4e9
NCCL_BYTES = 1.9e9
# Resident set of a training process before it has a model (memory account of examples/quickstart.toml, 2026-11-22,
# torch 2.13), and what its peak holds beyond tensors: scratch of operators and the C library's arenas. 61 MB in
# examples/first-run.toml, 95 MB in the quickstart.
CPU_PROCESS_BYTES = 289e6
CPU_SCRATCH_BYTES = 80e6
# Reserved by the caching allocator and not in use: 6 to 11% of the rest in the six runs of benchmarks/training_gpu.py.
FRAGMENTATION_SHARE = 0.08


class Groups(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters (elements) of FSDP's groups: `layers` blocks, the head with the final norm, and the root."""

    block: int
    head: int
    root: int
    layers: int

    def whole(self) -> int:
        """All of them."""
        return self.layers * self.block + self.head + self.root


def parameter_groups(model: ModelSpec) -> Groups:
    """FSDP's groups as parallel/shard.py makes them: a tied head stays with the embedding in the root."""
    block = sum(prod(shape) for shape in block_shapes(model).values())
    outside = count_parameters(model) - model.layers * block
    head = 0 if model.tied_embeddings else (model.vocabulary + 1) * model.d_model
    return Groups(block=block, head=head, root=outside - head, layers=model.layers)


def local_parameters(model: ModelSpec, shard: int) -> int:
    """Parameters that the fullest rank holds: dim 0 is split as torch.chunk does, in rows of ceil(rows / shard)."""

    def local(shapes: dict[str, tuple[int, ...]]) -> int:
        return sum(ceil(shape[0] / shard) * prod(shape[1:]) for shape in shapes.values())

    # Blocks are alike: counted once, because a search asks this of thousands of layouts.
    outside = parameter_shapes(msgspec.structs.replace(model, layers=0))
    return model.layers * local(block_shapes(model)) + local(outside)


def predict_memory(job: Job) -> MemoryAccount:
    """Bytes of the fullest rank at the step's peak, when the backward pass begins."""
    local = local_parameters(job.model, job.layout.shard)
    states = 0
    if job.optimizer.name == "adamw":
        # Two moments, and a step count a parameter tensor.
        states = 2 * STATE_BYTES * local + 4 * count_tensors(job.model)
    account = MemoryAccount(
        parameters=STATE_BYTES * local,
        # Kept in full even where the peak comes before they are complete: on a GPU they lie in the pool of the
        # reduction's stream, which the compute stream's activations cannot use.
        gradients=STATE_BYTES * local,
        optimizer_states=states,
        activations=activation_bytes(job),
        logits=logits_bytes(job),
        communication_buffers=gathered_bytes(job) + reduction_bytes(job),
        framework=framework_bytes(job),
    )
    return msgspec.structs.replace(account, fragmentation=fragmentation_bytes(job, account))


def count_tensors(model: ModelSpec) -> int:
    """Number of parameter tensors."""
    outside = parameter_shapes(msgspec.structs.replace(model, layers=0))
    return model.layers * len(block_shapes(model)) + len(outside)


def activation_bytes(job: Job) -> float:
    """Tensors that autograd keeps from the forward pass to the backward pass, all blocks of one microbatch."""
    tokens = job.layout.microbatch * job.data.sequence
    token_bytes = BYTES[job.layout.precision] * saved_elements(job.model, compiled=job.cluster.device.kind == "cuda")
    # Attention's log-sum-exp and two norms' reciprocal roots, fp32.
    token_bytes += 4 * (job.model.heads + 2)
    # Beside the blocks: the embedding keeps its int64 tokens (its output is the first block's input, counted there);
    # the final norm its input, that scaled (eager composite on a CPU) and a root; the head the norm's output.
    norms = (3 if job.cluster.device.kind == "cpu" else 2) * job.model.d_model
    outside_bytes = 8 + norms * BYTES[job.layout.precision] + 4
    # cos and sin, fp32, once for all blocks and sequences.
    tables_bytes = 2 * job.data.sequence * job.model.head_dim // 2 * 4
    return float(tokens * (job.model.layers * token_bytes + outside_bytes) + tables_bytes)


def saved_elements(model: ModelSpec, *, compiled: bool) -> int:
    """Elements a token that one block keeps for its backward pass.

    Residual inputs of the two norms 2D; the norms' outputs, which the projections keep, 2D; queries and attention's
    output 2HE; keys and values 2KE; gate, up and their product 3F. Eager code on a CPU keeps besides: the norms' scaled
    inputs 2D, attention's output once more with heads innermost HE, and silu's output F; a test holds that sum to the
    built model.
    """
    width = model.heads * model.head_dim
    fused = 4 * model.d_model + 2 * width + 2 * model.kv_heads * model.head_dim + 3 * model.feed_forward
    return fused if compiled else fused + 2 * model.d_model + width + model.feed_forward


def logits_bytes(job: Job) -> float:
    """The loss's tensors of vocabulary width at their peak, in the backward pass through fp32 cross entropy.

    Eager: the saved log-probabilities, the gradient with respect to them, and the gradient with respect to the fp32
    logits that is computed from both. (The forward pass holds less: logits, their fp32 copy, log-probabilities.)
    Compiled: the logits and their gradient, both in the compute precision; no fp32 copy is ever whole in memory. On
    an H200 the allocated peak of benchmarks/training_gpu.py less everything else leaves 3.8 bytes a logit.
    """
    elements = job.layout.microbatch * job.data.sequence * job.model.vocabulary
    compiled = job.cluster.device.kind == "cuda"
    return float(elements * (2 * BYTES[job.layout.precision] if compiled else 3 * 4))


def gathered_bytes(job: Job) -> float:
    """Parameters in compute precision beside the fp32 masters.

    Kept whole, or else: root and head, which the ends of both passes need, one block at work and one gathered ahead.
    A gather's own buffer, as large as the largest group, lies in the pool of the gather's stream. FSDP makes the
    compute copy in a single process too.
    """
    groups, layout = parameter_groups(job.model), job.layout
    elements = groups.root + groups.head + min(2, groups.layers) * groups.block
    if layout.zero < 3:
        elements = groups.whole()
    if layout.shard > 1:
        elements += max(groups.block, groups.head, groups.root)
    return float(elements * BYTES[layout.precision])


def reduction_bytes(job: Job) -> float:
    """Gradients on their way: of one block, and the fp32 input of its reduction; whole ones where they are kept.

    FSDP accumulates gradients that it does not reduce yet in the reduction's precision, fp32.
    """
    groups, layout = parameter_groups(job.model), job.layout
    in_flight = groups.block * (BYTES[layout.precision] + STATE_BYTES)
    keeps = (layout.zero == 1 or layout.shard == 1) and layout.accumulation(job.data.global_batch) > 1
    return float(in_flight + (STATE_BYTES * groups.whole() if keeps else 0))


def framework_bytes(job: Job) -> float:
    """What the process holds outside the model."""
    if job.cluster.device.kind == "cpu":
        return CPU_PROCESS_BYTES
    return CONTEXT_BYTES + (NCCL_BYTES if job.layout.world_size > 1 else 0.0)


def fragmentation_bytes(job: Job, account: MemoryAccount) -> float:
    """Share of what the caching allocator hands out; on a CPU, which has none, the process's scratch."""
    if job.cluster.device.kind == "cpu":
        return CPU_SCRATCH_BYTES
    return FRAGMENTATION_SHARE * (account.total() - account.framework)
