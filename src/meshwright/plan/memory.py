"""Predicted bytes per rank, term by term. docs/predicting.md has the table of what each zero holds whole."""

import msgspec

from meshwright.account import MemoryAccount
from meshwright.plan.activations import Seen, peak_bytes
from meshwright.plan.context import context_buffer_bytes
from meshwright.plan.expert import expert_buffer_bytes
from meshwright.plan.frame import Frame, build_frame
from meshwright.plan.held import divided_elements, state_bytes, whole_bytes
from meshwright.plan.kept import BYTES, tokens_of
from meshwright.plan.kernels import residual_width
from meshwright.plan.part import STATE_BYTES, Groups, Part, holds_whole
from meshwright.spec import AXES, Job, Moment

# Device context with PyTorch's kernels, and NCCL's channels on top of it: 1.4 GB on one H200 and 3.3 GB on each of two
# (memory account of benchmarks/training_gpu.py, `framework`, torch 2.11, 2026-11-22).
CONTEXT_BYTES = 1.4e9
NCCL_BYTES = 1.9e9
# Of programs with kernels of their own: cuBLAS's, 32 MiB each for the threads of forward and backward passes, and as
# much for Transformer Engine's. Megatron-Core's functional tests hold so much beside their states on Hopper and later
# (its golden values, mem-allocated-bytes).
WORKSPACE_BYTES = 3 * 32 * 2**20
# Resident set of a training process before it has a model (memory account of examples/quickstart.toml, 2026-11-22,
# torch 2.13), and what its peak holds beyond tensors: scratch of operators and the C library's arenas. 61 MB in
# examples/first-run.toml, 95 MB in the quickstart.
CPU_PROCESS_BYTES = 289e6
CPU_SCRATCH_BYTES = 80e6


def predict_memory(job: Job, frame: Frame | None = None) -> MemoryAccount:
    """Bytes of the fullest rank at the step's peak, when a backward pass begins.

    frame: what build_frame gives for the job, where the caller has it already.
    """
    frame = frame or build_frame(job)
    alive = frame.timetable.alive
    apart = [frame.parts[place] for place in frame.apart] or tell_apart(job, frame)
    each = (held_bytes(job, part, alive[part.rank], frame.seen) for part in apart)
    return with_framework(job, max(each, key=lambda held: sum_held(held) + held.fragmentation))


def predict_memories(job: Job, frame: Frame) -> tuple[MemoryAccount, ...]:
    """Bytes of every rank along pipeline, at its own peak."""
    alive = frame.timetable.alive
    return tuple(with_framework(job, held_bytes(job, part, alive[part.rank])) for part in frame.parts)


def with_framework(job: Job, held: MemoryAccount) -> MemoryAccount:
    """What a rank holds, with the process around it."""
    return msgspec.structs.replace(held, framework=framework_bytes(job))


def tell_apart(job: Job, frame: Frame) -> list[Part]:
    """The parts that could be the fullest: ranks in the middle of a pipeline differ by the microbatches alive alone."""
    again, apart = job.layout.recomputed_layers(job.model.layers), list(frame.parts[:1])
    kinds = [[stage.kind(frame.cut, again) for stage in part.stages] for part in frame.parts]
    for part, before, kind in zip(frame.parts[1:], kinds, kinds[1:], strict=False):
        if kind != before or not frame.timetable.emptier[part.rank]:
            apart.append(part)
    return apart


def sum_held(account: MemoryAccount) -> float:
    """What tensors take: all but the framework and fragmentation."""
    return (
        account.parameters
        + account.gradients
        + account.optimizer_states
        + account.activations
        + account.logits
        + account.communication_buffers
    )


def held_bytes(job: Job, part: Part, alive: tuple[Moment, ...], seen: Seen | None = None) -> MemoryAccount:
    """What a rank along pipeline holds but for the framework."""
    # Gradients are kept in full even where the peak comes before they are complete: on a GPU they lie in the pool of
    # the reduction's stream, which the compute stream's activations cannot use.
    groups = part.groups
    activations, logits, hole = peak_bytes(job, part, alive, seen)
    buffers = context_buffer_bytes(job, part.cut)
    if job.trainer.gathers:
        states = state_bytes(job, part.local, part.tensors)
        buffers += gathered_bytes(job, groups) + reduction_bytes(job, groups)
    else:
        states = whole_bytes(job, groups)
        buffers += boundary_bytes(job, part)
    update = 0.0 if job.trainer.gathers else update_bytes(job, groups)
    if update > activations + logits:
        # The step is fullest where its optimizer runs, and activations are gone.
        activations, logits, hole, buffers = 0.0, 0.0, 0.0, boundary_bytes(job, part) + update
    elif groups.routed:
        buffers += expert_buffer_bytes(job)
    return msgspec.structs.replace(
        states,
        activations=activations,
        logits=logits,
        communication_buffers=buffers,
        fragmentation=fragmentation_bytes(job, activations + logits + buffers, hole),
    )


def gathered_bytes(job: Job, groups: Groups) -> float:
    """Parameters in compute precision beside the fp32 masters.

    Kept whole, or else: root and head, which the ends of both passes need, one block at work and one gathered ahead.
    A gather's own buffer, as large as the largest group, lies in the pool of the gather's stream; routed experts are
    a group by themselves. FSDP makes the compute copy in a single process too.
    """
    layout = job.layout
    elements = groups.root + groups.head + min(2, groups.layers) * groups.largest_block
    if layout.zero < 3:
        elements = groups.whole()
    arriving = [groups.largest_plain, groups.head, groups.root] if layout.parameter_shards > 1 else []
    arriving += [groups.largest_routed] if layout.expert_shard > 1 else []
    elements += max(arriving, default=0)
    return float(elements * BYTES[layout.precision])


def reduction_bytes(job: Job, groups: Groups) -> float:
    """Gradients on their way: of one block, and the fp32 input of its reduction; whole ones where they are kept.

    FSDP accumulates gradients that it does not reduce yet in the reduction's precision, fp32.
    """
    layout = job.layout
    in_flight = groups.largest_block * (BYTES[layout.precision] + STATE_BYTES)
    kept = 0
    if layout.accumulation(job.data.global_batch) > 1:
        kept += groups.whole() - groups.routed if holds_whole(layout, layout.parameter_shards) else 0
        kept += groups.routed if holds_whole(layout, layout.expert_shard) else 0
    return float(in_flight + STATE_BYTES * kept)


def update_bytes(job: Job, groups: Groups) -> float:
    """What an optimizer of fp32 masters copies of gradients in compute precision: a rank's part in one row, and that in
    fp32 (ZeRO-1 of DeepSpeed, stage_1_and_2.py)."""
    size = BYTES[job.layout.precision]
    if job.trainer.gradient_bytes > size:
        return 0.0
    return divided_elements(job, groups) * (size + STATE_BYTES)


def boundary_bytes(job: Job, part: Part) -> float:
    """What came last over each of a rank's stages' two ends: states and gradients of one microbatch.

    Megatron-Core holds them from one step to the next: its functional tests' mem-allocated-bytes grow by so much with
    each stage that a rank has.
    """
    if job.layout.pipeline == 1:
        return 0.0
    state = tokens_of(job) * residual_width(job, part.cut) * BYTES[job.layout.precision]
    return 2 * len(part.stages) * state


def framework_bytes(job: Job) -> float:
    """What the process holds outside the model."""
    if job.cluster.device.kind == "cpu":
        return CPU_PROCESS_BYTES
    if not job.trainer.gathers:
        # A communicator, with channels of its own, for each axis in use.
        return WORKSPACE_BYTES + CONTEXT_BYTES + NCCL_BYTES * sum(job.layout.size(axis) > 1 for axis in AXES)
    return CONTEXT_BYTES + (NCCL_BYTES if job.layout.world_size > 1 else 0.0)


def fragmentation_bytes(job: Job, passing: float, hole: float) -> float:
    """What the caching allocator has reserved and cannot use, of `passing` bytes that come and go in a step: states are
    allocated once and for all. hole: as peak_bytes has it. On a CPU, which has no such allocator, scratch."""
    if job.cluster.device.kind == "cpu":
        return CPU_SCRATCH_BYTES
    return max(job.trainer.fragmentation * passing, hole)
