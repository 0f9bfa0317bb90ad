"""What a layout costs by itself: transfers, waiting for larger parts, work done twice, updates, a slow precision."""

import re
from operator import attrgetter
from statistics import fmean

import msgspec

from meshwright.account import Purpose
from meshwright.explain.case import Case, advise
from meshwright.explain.explanation import Advice
from meshwright.explain.lateness import NAMED, Losses
from meshwright.explain.steps import RankStep
from meshwright.explain.words import bytes_text, seconds_text
from meshwright.plan import predict_memory

# What to do about exposed transfers of each purpose. docs/advice.md says it by the names of several trainers.
EXPOSED: dict[Purpose, str] = {
    "replica": "average gradients less often (accumulate over microbatches without it), or in larger buckets that "
    "overlap the backward pass",
    "shard": "fetch the next layer's parameters earlier, keep them between forward and backward pass (ZeRO 2), "
    "or take larger microbatches",
    "tensor": "spread tensors over fewer ranks, all within one node, or overlap (asynchronous tensor parallelism)",
    "context": "spread sequences over fewer ranks: attention hides its exchange only where each has enough tokens",
    "expert": "spread experts over fewer ranks, all within one node if they fit, or take larger microbatches",
    "pipeline": "take fewer stages, or more microbatches, so that messages are under way while others compute",
    "control": "norms, counts and barriers in every step: do them less often, or in one transfer",
}
# Groups that evidence names.
NAMED_GROUPS = 2
# Of a device's memory, what must stay free where activations are kept; and, where nobody can say how much they take,
# what must be free for it to be worth trying.
KEPT_FREE = 0.1
WORTH_TRYING = 0.25
# Matrix products on the cores for single precision: cuBLAS's and CUTLASS's names for them, and hipBLASLt's.
FP32 = re.compile(r"sgemm|_simt_|f32f32_f32f32_f32|Cijk_\w*_SB_")


def exposed(purpose: Purpose, case: Case) -> Advice:
    """Transfer that nothing ran beside."""
    seconds = attrgetter(f"comm_{purpose}")
    hidden = fmean(one.resolved.overlapped.get(purpose, 0.0) for ranks in case.steps for one in ranks)
    groups = [group for group in case.detail.groups if group.purpose == purpose][:NAMED_GROUPS]
    carried = [
        (f"{group.count} a step in {group.group or 'a group'} of {len(group.ranks)} ranks" if group.ranks else "")
        + (f", {bytes_text(group.sent_bytes)} sent by each" if group.sent_bytes is not None else "")
        for group in groups
    ]
    beside = f"{seconds_text(hidden)} more ran under compute" if hidden > 0 else ""
    what = f"Transfers of {purpose} stand alone, with nothing running beside them: {EXPOSED[purpose]}."
    gain = case.gain_of(lambda one: seconds(one.resolved.account))
    return advise(case, f"exposed {purpose}", gain, what, *carried, beside)


def uneven(case: Case) -> Advice:
    """Ranks waited for those that the layout gave more work; by equal parts each would do the mean."""
    gain = fmean(uneven_s(ranks, losses) for ranks, losses in zip(case.steps, case.losses, strict=True))
    waits: dict[int, float] = {}
    for ranks in case.steps:
        for one in ranks:
            waits[one.resolved.rank] = waits.get(one.resolved.rank, 0.0) + one.resolved.account.imbalance
    busiest = min(waits, key=lambda rank: waits[rank])
    if case.pipeline:
        what = f"Stages are unequal, and rank {busiest} has the most to do: move blocks from its stage to others."
    else:
        what = "Experts are sent unequal numbers of tokens: a stronger balance loss, or biases that follow the load."
    longest = max(waits.values()) / len(case.steps)
    return advise(
        case, "imbalance", gain, what, f"waits of up to {seconds_text(longest)} a step, rank {busiest}'s least"
    )


def uneven_s(ranks: list[RankStep], losses: Losses) -> float:
    """Of one step, what its ranks wait in the mean for the busiest, but for what a cause with a name made it late."""
    waits = {one.resolved.rank: one.resolved.account.imbalance for one in ranks}
    busiest = min(waits, key=lambda rank: waits[rank])
    late = {rank: sum(losses.own[cause][rank] for cause in NAMED) for rank in waits}
    return fmean(max(0.0, wait - max(0.0, late[busiest] - late[rank])) for rank, wait in waits.items())


def bubble(case: Case) -> Advice:
    """What a pipeline idles by its schedule."""
    what = (
        "The pipeline fills and drains: more and smaller microbatches, fewer stages, or a schedule of several stages a "
        "rank (interleaved, zero-bubble)."
    )
    return advise(case, "bubble", case.account.bubble, what)


def recomputing(case: Case) -> Advice | None:
    """The forward pass is run again to save memory, and there is memory."""
    memory, device = case.memory, case.device
    if memory is None or device is None or not device.memory_bytes:
        return None
    free = device.memory_bytes - memory.total()
    needed = 0.0
    if case.job is not None:
        kept = msgspec.structs.replace(case.job, layout=msgspec.structs.replace(case.job.layout, recompute="none"))
        needed = predict_memory(kept).total() - predict_memory(case.job).total()
    least = needed + KEPT_FREE * device.memory_bytes if needed else WORTH_TRYING * device.memory_bytes
    if free < least:
        return None
    what = "Activations are computed twice although memory has room: keep all of them, or of as many layers as fit."
    room = f"{bytes_text(free)} of {bytes_text(device.memory_bytes)} free at the fullest moment"
    planned = f"keeping all would take {bytes_text(needed)} by the plan" if needed else ""
    gain = case.gain_of(lambda one: one.resolved.account.recompute)
    return advise(case, "recompute", gain, what, room, planned)


def updating(case: Case) -> Advice:
    """Updates take much of a step: little is computed between two of them."""
    gain = case.gain_of(lambda one: one.resolved.account.optimizer)
    what = (
        "Gradient norm, clipping and update take much of a step that computes little: more tokens a step (larger "
        "or more microbatches), a fused optimizer, or its states divided over ranks."
    )
    return advise(case, "optimizer", gain, what, f"{seconds_text(case.account.compute)} of compute beside it")


def slowed(case: Case) -> Advice:
    """Kernels took longer while something else used what they need."""
    if case.kind == "cpu":
        gain = case.gain("contention")
        what = "Processes take the cores from each other: fewer ranks or threads than the machine has cores."
    else:
        gain = case.gain_of(lambda one: one.resolved.account.contention)
        what = (
            "Transfers slow the kernels that they run beside: fewer channels for NCCL (NCCL_MAX_CTAS), or fewer and "
            "larger transfers."
        )
    return advise(case, "contention", gain, what)


def imprecise(case: Case) -> Advice | None:
    """Matrix products in single precision on a device that has faster."""
    device, products = case.device, case.detail.kernels
    slow = [group for group in products if FP32.search(group.busiest) and "tf32" not in group.busiest.lower()]
    if case.kind != "cuda" or not (slow or (not products and case.precision == "fp32")):
        return None
    what = (
        "Matrix products run in single precision: bf16 (autocast, or the model's dtype), or TF32 "
        '(torch.set_float32_matmul_precision("high")).'
    )
    if case.jax:
        what = "Matrix products take single precision: bf16 for what they multiply."
    share, known = 0.0, device is not None and device.peak_fp32_flops_per_s > 0
    if device is not None and device.peak_bf16_flops_per_s > 0:
        share = 1 - device.peak_fp32_flops_per_s / device.peak_bf16_flops_per_s
    seconds = sum(group.seconds for group in slow)
    return advise(
        case,
        "precision",
        seconds * share if known and slow else None,
        what,
        f"{seconds_text(seconds)} a step in kernels such as {slow[0].busiest}" if slow else "fp32, as recorded",
    )
