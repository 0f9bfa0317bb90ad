"""Predicted bytes per rank, term by term. docs/planning.md has the table of what each zero holds whole."""

import msgspec

from meshwright.account import MemoryAccount
from meshwright.plan.activations import BYTES, activation_bytes, logits_bytes
from meshwright.plan.part import Groups, Part, build_part
from meshwright.spec import Job

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


def predict_memory(job: Job, part: Part | None = None) -> MemoryAccount:
    """Bytes of the fullest rank at the step's peak, when the backward pass begins.

    part: what build_part gives for the job, where the caller has it already.
    """
    part = part or build_part(job)
    groups, local = part.groups, part.local
    states = 0
    if job.optimizer.name == "adamw":
        # Two moments, and a step count a parameter tensor.
        states = 2 * STATE_BYTES * local + 4 * part.tensors
    account = MemoryAccount(
        parameters=STATE_BYTES * local,
        # Kept in full even where the peak comes before they are complete: on a GPU they lie in the pool of the
        # reduction's stream, which the compute stream's activations cannot use.
        gradients=STATE_BYTES * local,
        optimizer_states=states,
        activations=activation_bytes(job, part),
        logits=logits_bytes(job),
        communication_buffers=gathered_bytes(job, groups) + reduction_bytes(job, groups),
        framework=framework_bytes(job),
    )
    return msgspec.structs.replace(account, fragmentation=fragmentation_bytes(job, account))


def gathered_bytes(job: Job, groups: Groups) -> float:
    """Parameters in compute precision beside the fp32 masters.

    Kept whole, or else: root and head, which the ends of both passes need, one block at work and one gathered ahead.
    A gather's own buffer, as large as the largest group, lies in the pool of the gather's stream. FSDP makes the
    compute copy in a single process too.
    """
    layout = job.layout
    elements = groups.root + groups.head + min(2, groups.layers) * groups.largest_block
    if layout.zero < 3:
        elements = groups.whole()
    if layout.shard > 1:
        elements += max(groups.largest_block, groups.head, groups.root)
    return float(elements * BYTES[layout.precision])


def reduction_bytes(job: Job, groups: Groups) -> float:
    """Gradients on their way: of one block, and the fp32 input of its reduction; whole ones where they are kept.

    FSDP accumulates gradients that it does not reduce yet in the reduction's precision, fp32.
    """
    layout = job.layout
    in_flight = groups.largest_block * (BYTES[layout.precision] + STATE_BYTES)
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
