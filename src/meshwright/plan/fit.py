"""What a layout must recompute to fit its device, and how it is refused where it cannot."""

from collections.abc import Callable
from math import ceil

import msgspec

from meshwright.account import MemoryAccount
from meshwright.plan.frame import Frame
from meshwright.plan.memory import predict_memory
from meshwright.plan.part import STATE_BYTES
from meshwright.plan.time import share_machine
from meshwright.spec import Job, Layout, Recompute

# Where the number of recomputed blocks is the plan's choice, it leaves this share of the device free: the model of
# memory is a few per cent off (tests/test_plan_memory.py), and retries near the limit cost more than a block
# (microbatch 3 in the notes on GPU baselines).
SPARE = 0.05

# What a host's memory holds for each of its devices: 2 TB for 8 in NVIDIA's DGX H100 and H200 (their datasheets).
# Clusters do not say; what offloads more than this is not offered.
HOST_BYTES_PER_DEVICE = 250e9

# Of a model's blocks, how many a rough answer may be off.
ROUGHLY = 1 / 8

FrameOf = Callable[[Job], Frame]


class Rejected(msgspec.Struct, frozen=True, kw_only=True):
    """A layout that cannot run: why, and the nearest that can. memory: None where something else is at fault."""

    layout: Layout
    reason: str
    nearest: str
    memory: MemoryAccount | None = None


def fit_recompute(
    job: Job,
    frame_of: FrameOf,
    fixed: Recompute | int | None = None,
    *,
    roughly: bool = False,
    at_least: int = 1,
) -> tuple[list[Job], Rejected | None]:
    """The job with what it must recompute to fit its device: nothing, or else what costs least of each kind.

    Those are the element-wise work alone, and as few first blocks as it takes. What recomputes more than it must
    is slower and no better, so it is not among them. The rejection is of the job that recomputes everything.
    frame_of: stages are balanced by what they recompute too, so each of these has its own. fixed: recompute this and
    nothing else. roughly: of a pipeline's blocks, fewer than it takes will do, to save time. at_least: blocks
    that are known to be needed, if any are.
    """
    if error := host_refusal(job, frame_of):
        return [], error
    if fixed is not None:
        job = with_layout(job, msgspec.structs.replace(job.layout, recompute=fixed))
        return ([job], None) if missing_bytes(job, frame_of) <= 0 else ([], reject_memory(job, frame_of))
    missing = missing_bytes(job, frame_of)
    if missing <= 0:
        return [job], None
    full = with_layout(job, msgspec.structs.replace(job.layout, recompute="full"))
    if missing_bytes(full, frame_of) > 0:
        return [], reject_memory(full, frame_of)
    selective = with_layout(job, msgspec.structs.replace(job.layout, recompute="selective"))
    fitting = [selective] if missing_bytes(selective, frame_of) <= 0 else []
    return [*fitting, fewest_recomputed(job, full, frame_of, missing, roughly=roughly, at_least=at_least)], None


def fewest_recomputed(
    job: Job, full: Job, frame_of: FrameOf, missing: float, *, roughly: bool = False, at_least: int = 1
) -> Job:
    """The job with as few first blocks recomputed as leave SPARE free; `full`, which fits, where all are needed.

    missing: bytes of the job as it is.
    """

    def first(layers: int) -> Job:
        return with_layout(job, msgspec.structs.replace(job.layout, recompute=layers))

    spare_bytes = SPARE * share_machine(job).cluster.device.memory_bytes
    if job.layout.pipeline == 1:
        # Memory falls by as much with each block, but for the last, whose activations take the loss's place.
        saved_bytes = missing - missing_bytes(first(1), frame_of)
        layers = ceil((missing + spare_bytes) / saved_bytes) if saved_bytes > 0 else job.model.layers
        return first(layers) if layers < job.model.layers else full
    # First blocks are those of the first ranks; once these have room, others are the fullest.
    low, high = at_least - 1, job.model.layers
    if 1 < at_least < high and missing_bytes(first(at_least), frame_of) + spare_bytes <= 0:
        return first(at_least)
    while high - low > (max(1, ROUGHLY * job.model.layers) if roughly else 1):
        middle = (low + high) // 2
        low, high = (low, middle) if missing_bytes(first(middle), frame_of) + spare_bytes <= 0 else (middle, high)
    if roughly:
        return first(low + 1)
    return first(high) if high < job.model.layers else full


def host_refusal(job: Job, frame_of: FrameOf) -> Rejected | None:
    """The rejection of a layout that offloads more than a host holds; None where it does not."""
    offload = job.layout.offload
    if offload == "none":
        return None
    # Moments alone, or with parameters and gradients.
    numbers = {"optimizer": 2, "parameters": 4 if job.optimizer.name == "adamw" else 2}[offload]
    needed = STATE_BYTES * numbers * max(part.local for part in frame_of(job).parts)
    if needed <= HOST_BYTES_PER_DEVICE:
        return None
    reason = f"offloads {gb(needed)} GB a rank, and a host is taken to have {gb(HOST_BYTES_PER_DEVICE)}"
    memory = predict_memory(job, frame_of(job))
    return Rejected(layout=job.layout, reason=reason, nearest="", memory=memory)


def with_layout(job: Job, layout: Layout) -> Job:
    """The same job laid out otherwise."""
    return msgspec.structs.replace(job, layout=layout)


def missing_bytes(job: Job, frame_of: FrameOf) -> float:
    """What the fullest rank needs beyond its device's memory; negative where some is left."""
    job = share_machine(job)
    return predict_memory(job, frame_of(job)).total() - job.cluster.device.memory_bytes


def reject_memory(job: Job, frame_of: FrameOf) -> Rejected:
    """The rejection of a layout that does not fit its device: by how much, and which terms are largest."""
    memory = predict_memory(share_machine(job), frame_of(job))
    capacity_bytes = share_machine(job).cluster.device.memory_bytes
    largest = sorted(memory.rows(), key=lambda row: -row[1])[:2]
    terms = ", ".join(f"{name.replace('_', ' ')} {gb(size)}" for name, size in largest)
    reason = f"needs {gb(memory.total())} GB of {gb(capacity_bytes)}: {terms}"
    return Rejected(layout=job.layout, reason=reason, nearest="", memory=memory)


def gb(size_bytes: float) -> str:
    """Bytes in GB, as datasheets count them."""
    return f"{size_bytes / 1e9:.1f}"
