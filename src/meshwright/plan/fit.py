"""What a layout must recompute to fit its device, and how it is refused where it cannot."""

from collections.abc import Callable, Sequence
from math import ceil

import msgspec

from meshwright.account import MemoryAccount
from meshwright.plan.frame import Frame
from meshwright.plan.memory import predict_memory
from meshwright.plan.part import STATE_BYTES
from meshwright.plan.time import share_machine
from meshwright.spec import SPLIT_BACKWARD, Job, Layout, Recompute

# What a plan offers leaves this share of the device free: the model of memory is a few per cent off
# (tests/test_plan_memory.py), and near the limit an allocator gives back and asks again, which costs more than a block.
SPARE = 0.05

# What a host's memory holds for each of its devices: 2 TB for 8 in NVIDIA's DGX H100 and H200 (their datasheets).
# Clusters do not say; what offloads more than this is not offered.
HOST_BYTES_PER_DEVICE = 250e9

# A rough answer may be off by one of so many parts of a model's blocks.
ROUGHLY = 8

FrameOf = Callable[[Job], Frame]


class Rejected(msgspec.Struct, frozen=True, kw_only=True):
    """A layout that cannot run: why, and the nearest that can. memory: None where something else is at fault."""

    layout: Layout
    reason: str
    nearest: str
    memory: MemoryAccount | None = None


def fit_recompute(
    job: Job, frame_of: FrameOf, fixed: Recompute | int | None = None, *, at_least: int = 1
) -> tuple[list[Job], Rejected | None]:
    """The job with what it must recompute to fit its device: nothing, or else what costs least of each kind.

    Those are the element-wise work alone, and as few first blocks as it takes. What recomputes more than it must
    is slower and no better, so it is not among them. The rejection is of the job that recomputes everything.
    frame_of: stages are balanced by what they recompute too, so each of these has its own. fixed: recompute this and
    nothing else. at_least: blocks that are known to be needed, if any are.

    Recomputing everything is taken to need least. Ranks of a pipeline whose stages differ, and a block's room
    (activations.peak_bytes), can make it need up to 2% more than the least: what fits by less than that is refused.
    """
    if error := host_refusal(job, frame_of):
        return [], error
    if fixed is not None:
        job = recomputing(job, fixed)
        return ([job], None) if missing_bytes(job, frame_of) <= 0 else ([], reject_memory(job, frame_of))
    if at_least == 1 and missing_bytes(job, frame_of) <= 0:
        return [job], None
    full = recomputing(job, "full")
    if missing_bytes(full, frame_of) > 0:
        return [], reject_memory(full, frame_of)
    selective = recomputing(job, "selective")
    fitting = [selective] if missing_bytes(selective, frame_of) <= 0 else []
    return [*fitting, recomputing(job, fewest_recomputed(job, frame_of, at_least))], None


def least_recompute(
    job: Job, frame_of: FrameOf, fixed: Recompute | int | None = None, known: Sequence[Recompute | int] = ()
) -> list[Recompute | int]:
    """What fit_recompute's jobs recompute, or less; nothing where none fits.

    Few looks, and refusals first, to save time: of a pipeline's blocks fewer than it takes will do. known: what it gave
    for a job that needs no more memory.
    """

    def fits(recompute: Recompute | int) -> bool:
        return missing_bytes(recomputing(job, recompute), frame_of) <= 0

    if host_refusal(job, frame_of):
        return []
    if fixed is not None:
        return [fixed] if fits(fixed) else []
    without = job.layout.recompute
    maybe = not known or without in known
    # Where products are put off, to recompute everything may take more than to recompute nothing.
    first = job.layout.schedule in SPLIT_BACKWARD
    if maybe and first and fits(without):
        return [without]
    if not fits("full"):
        return []
    if maybe and not first and fits(without):
        return [without]
    fitting: list[Recompute | int] = ["selective"] if (maybe or "selective" in known) and fits("selective") else []
    if job.layout.pipeline == 1:
        return [*fitting, fewest_recomputed(job, frame_of)]
    low, _ = between(job, frame_of, count_least(known), coarse=max(1, job.model.layers // ROUGHLY))
    return [*fitting, low + 1]


def count_least(known: Sequence[Recompute | int]) -> int:
    """How many blocks must be recomputed at the least where these are the choices; 1 where that is not known."""
    return 1 if "none" in known else min((again for again in known if isinstance(again, int)), default=1)


def recomputing(job: Job, recompute: Recompute | int) -> Job:
    """The same job with something else recomputed."""
    return with_layout(job, msgspec.structs.replace(job.layout, recompute=recompute))


def fewest_recomputed(job: Job, frame_of: FrameOf, at_least: int = 1) -> Recompute | int:
    """How few first blocks a job must recompute to fit, which does not fit without and fits with all."""
    layers = job.model.layers
    if job.layout.pipeline == 1:
        # Memory falls by as much with each block, but for the last, whose activations take the loss's place.
        missing, less = (missing_bytes(recomputing(job, again), frame_of) for again in (0, 1))
        fewest = ceil(missing / (missing - less)) if missing > less else layers
    else:
        # First blocks are those of the first ranks; once these have room, others are the fullest.
        _, fewest = between(job, frame_of, at_least)
    return fewest if fewest < layers else "full"


def between(job: Job, frame_of: FrameOf, at_least: int, coarse: int = 1) -> tuple[int, int]:
    """Numbers of first blocks, at most `coarse` apart, of which recomputing the one is too few to fit and the other
    is enough."""
    layers = job.model.layers
    low, high = at_least - 1, layers

    def enough(again: int) -> bool:
        return missing_bytes(recomputing(job, again), frame_of) <= 0

    # What is known to be needed is often enough, or nearly.
    for guess in (at_least, low + layers // ROUGHLY) if at_least > 1 else ():
        if low < guess < high:
            low, high = (low, guess) if enough(guess) else (guess, high)
    while high - low > coarse:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return low, high


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


def room_bytes(job: Job) -> float:
    """What a plan fills of the job's device at most."""
    return (1 - SPARE) * share_machine(job).cluster.device.memory_bytes


def missing_bytes(job: Job, frame_of: FrameOf) -> float:
    """What the fullest rank needs beyond its room; negative where some is left."""
    job = share_machine(job)
    return predict_memory(job, frame_of(job)).total() - room_bytes(job)


def reject_memory(job: Job, frame_of: FrameOf) -> Rejected:
    """The rejection of a layout that does not fit its device: by how much, and which terms are largest."""
    memory = predict_memory(share_machine(job), frame_of(job))
    largest = sorted(memory.rows(), key=lambda row: -row[1])[:2]
    terms = ", ".join(f"{name.replace('_', ' ')} {gb(size)}" for name, size in largest)
    reason = f"needs {gb(memory.total())} GB of {gb(room_bytes(job))} ({SPARE:.0%} stay free): {terms}"
    return Rejected(layout=job.layout, reason=reason, nearest="", memory=memory)


def gb(size_bytes: float) -> str:
    """Bytes in GB, as datasheets count them."""
    return f"{size_bytes / 1e9:.1f}"
