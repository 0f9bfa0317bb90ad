"""The layouts a job could have: which fit, how fast they are, and whether more than one device helps."""

from collections.abc import Iterable, Iterator, Sequence
from math import ceil

import msgspec

from meshwright.account import MemoryAccount
from meshwright.plan.memory import predict_memory
from meshwright.plan.part import Part, build_part
from meshwright.plan.time import predict_step, share_machine
from meshwright.record import Prediction
from meshwright.spec import Cluster, Job, Layout, SettingError, check_layout, check_split

# Predicted step times closer than this are a tie: the simpler layout comes first.
TIE = 0.01
# Larger microbatches fill no kernel better; gradient accumulation serves as well.
LARGEST_MICROBATCH = 64
# Where the number of recomputed blocks is the plan's choice, it leaves this share of the device free: the model of
# memory is a few per cent off (tests/test_plan_memory.py), and retries near the limit cost more than a block
# (microbatch 3 in the notes on GPU baselines).
SPARE = 0.05
# Layouts that a plan lists; the rest are counted.
LISTED = 20

PRECISION_NOTE = {
    "cuda": "constants measured on H200s: within 15% of the steps measured there, unproven elsewhere",
    "cpu": "constants measured on one 2-core virtual machine: expect the order of layouts, not the milliseconds",
}
UNKNOWN_PEAK_NOTE = "the device's peak is not known: memory is predicted, time is not"
EXPERTS_NOTE = (
    "expert parallelism is not planned yet (experts are sharded, and split along tensor, as other matrices are), and "
    "the time of routing tokens to them is not modelled; such models cannot be trained here yet"
)


class Rejected(msgspec.Struct, frozen=True, kw_only=True):
    """A layout that cannot run: why, and the nearest that can. memory: None where the batch is at fault."""

    layout: Layout
    reason: str
    nearest: str
    memory: MemoryAccount | None = None


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What planning found.

    verdict: whether one device is enough, in a sentence. job: the job's own layout as predicted; job_fits, whether
    it fits its device. one_device: the best layout of a single rank, None where none fits. ranked: fastest first,
    of `considered` that fit. capacity_bytes: of one device, for the job's own number of ranks.
    """

    verdict: str
    model: str
    cluster: Cluster
    sequence: int
    global_batch: int
    capacity_bytes: float
    job: Prediction
    job_fits: bool
    one_device: Prediction | None
    ranked: tuple[Prediction, ...]
    considered: int
    rejected: tuple[Rejected, ...]


def predict(job: Job, part: Part | None = None) -> Prediction:
    """The accounts of the job's own layout. part: what build_part gives for it, where the caller has it already."""
    job = share_machine(job)
    part = part or build_part(job)
    step, overlapped = predict_step(job, part)
    step_s = step.total()
    tokens = job.data.global_batch * job.data.sequence
    notes = [PRECISION_NOTE[job.cluster.device.kind] if step_s else UNKNOWN_PEAK_NOTE]
    notes += [EXPERTS_NOTE] if job.model.experts else []
    return Prediction(
        layout=job.layout,
        step=step,
        overlapped=overlapped,
        memory=predict_memory(job, part),
        step_s=step_s,
        tokens_per_s=tokens / step_s if step_s else 0.0,
        notes=tuple(notes),
    )


def build_plan(job: Job) -> Plan:
    """Predict the job's layout, rank the others beside it, and say first whether one device is enough."""
    found, rejected = search_layouts(job)
    own = predict(job)
    ranked = rank_predictions(found)
    one = next((p for p in ranked if p.layout.world_size == 1), None)
    capacity_bytes = share_machine(job).cluster.device.memory_bytes
    return Plan(
        verdict=explain_verdict(job, own, one, ranked),
        model=job.model.name,
        cluster=job.cluster,
        sequence=job.data.sequence,
        global_batch=job.data.global_batch,
        capacity_bytes=capacity_bytes,
        job=own,
        job_fits=own.memory.total() <= capacity_bytes,
        one_device=one,
        ranked=tuple(ranked[:LISTED]),
        considered=len(ranked),
        rejected=name_nearest(rejected, ranked),
    )


def search_layouts(job: Job) -> tuple[list[Prediction], list[Rejected]]:
    """Predictions of the layouts that fit, and a rejection for each split that does not divide or fit."""
    found: list[Prediction] = []
    rejected: list[Rejected] = []
    for tensor in axis_sizes(job.cluster.devices_per_node):
        # What means something along a tensor axis alone is left out where there is none.
        layout = msgspec.structs.replace(
            job.layout, tensor=tensor, recompute="none", async_tensor=job.layout.async_tensor and tensor > 1
        )
        refused = reject_tensor(job, layout)
        if refused is not None:
            rejected.append(refused)
            continue
        parts: dict[int, Part] = {}
        for ranks in axis_sizes(job.cluster.devices):
            if ranks % tensor:
                continue
            if job.data.global_batch % (ranks // tensor):
                rejected.append(reject_division(job, layout, ranks // tensor))
                continue
            for split in splits(layout, ranks // tensor):
                if split.shard not in parts:
                    parts[split.shard] = build_part(with_layout(job, split))
                search_split(job, split, parts[split.shard], found, rejected)
    return found, sorted(rejected, key=lambda r: r.layout.world_size)


def search_split(job: Job, split: Layout, part: Part, found: list[Prediction], rejected: list[Rejected]) -> None:
    """Add the predictions of one split over the axes, with every zero and microbatch, or why they cannot run."""
    for zero in (3, 2, 1) if split.shard > 1 else (3,):
        for microbatch in microbatches(job.data.global_batch // split.data_size):
            candidate = with_layout(job, msgspec.structs.replace(split, zero=zero, microbatch=microbatch))
            fitting, missing = fit_recompute(candidate, part)
            found += [predict(each, part) for each in fitting]
            if missing is not None:
                # Larger microbatches need more still.
                rejected.append(missing)
                if microbatch == 1:
                    # And so does holding more whole.
                    return
                break


def fit_recompute(job: Job, part: Part) -> tuple[list[Job], Rejected | None]:
    """The job with what it must recompute to fit its device: nothing, or else what costs least of each kind.

    Those are the element-wise work alone, and as few first blocks as it takes. What recomputes more than it must
    is slower and no better, so it is not among them. The rejection is of the job that recomputes everything.
    """
    if missing_bytes(job, part) <= 0:
        return [job], None
    full = with_layout(job, msgspec.structs.replace(job.layout, recompute="full"))
    if missing_bytes(full, part) > 0:
        return [], reject_memory(full, part)
    selective = with_layout(job, msgspec.structs.replace(job.layout, recompute="selective"))
    fitting = [selective] if missing_bytes(selective, part) <= 0 else []
    return [*fitting, fewest_recomputed(job, full, part)], None


def fewest_recomputed(job: Job, full: Job, part: Part) -> Job:
    """The job with as few first blocks recomputed as leave SPARE free; `full`, which fits, where all are needed."""

    def first(layers: int) -> Job:
        return with_layout(job, msgspec.structs.replace(job.layout, recompute=layers))

    # Memory falls by as much with each block, but for the last, whose activations take the loss's place.
    saved_bytes = missing_bytes(job, part) - missing_bytes(first(1), part)
    wanted_bytes = missing_bytes(job, part) + SPARE * share_machine(job).cluster.device.memory_bytes
    layers = ceil(wanted_bytes / saved_bytes) if saved_bytes > 0 else job.model.layers
    return first(layers) if layers < job.model.layers else full


def with_layout(job: Job, layout: Layout) -> Job:
    """The same job laid out otherwise."""
    return msgspec.structs.replace(job, layout=layout)


def missing_bytes(job: Job, part: Part) -> float:
    """What the fullest rank needs beyond its device's memory; negative where some is left."""
    job = share_machine(job)
    return predict_memory(job, part).total() - job.cluster.device.memory_bytes


def axis_sizes(devices: int) -> list[int]:
    """Powers of two and divisors up to a number of devices."""
    powers = {1 << exponent for exponent in range(devices.bit_length()) if 1 << exponent <= devices}
    divisors = {n for n in range(1, devices + 1) if devices % n == 0}
    return sorted(powers | divisors)


def splits(layout: Layout, ranks: int) -> Iterator[Layout]:
    """Every division of `ranks` over replica and shard."""
    for shard in (n for n in range(1, ranks + 1) if ranks % n == 0):
        yield msgspec.structs.replace(layout, replica=ranks // shard, shard=shard)


def microbatches(share: int) -> list[int]:
    """Sequences at once that divide a rank's share of the batch."""
    return [n for n in range(1, min(share, LARGEST_MICROBATCH) + 1) if share % n == 0]


def rank_predictions(predictions: Iterable[Prediction]) -> list[Prediction]:
    """Fastest first; within TIE of the fastest that is left, simplest first."""
    left = sorted(predictions, key=lambda p: p.step_s)
    ranked: list[Prediction] = []
    while left:
        ties = [p for p in left if p.step_s <= left[0].step_s * (1 + TIE)]
        ranked += sorted(ties, key=complexity)
        left = left[len(ties) :]
    return ranked


def complexity(prediction: Prediction) -> tuple[float, ...]:
    """What makes a layout the harder one to run: ranks, axes in use and what is recomputed, then memory."""
    layout = prediction.layout
    axes = sum(size > 1 for size in (layout.replica, layout.shard, layout.tensor))
    return (layout.world_size, axes + (layout.recompute not in ("none", 0)), prediction.memory.total())


def reject_tensor(job: Job, layout: Layout) -> Rejected | None:
    """Why the model cannot be split along the tensor axis as `layout` says, in check_split's words."""
    try:
        check_split(layout, job.model, job.data.sequence)
    except SettingError as error:
        lone = msgspec.structs.replace(layout, replica=1, shard=1, microbatch=1)
        return Rejected(layout=lone, reason=error.reason, nearest=error.nearest)
    return None


def reject_division(job: Job, layout: Layout, ranks: int) -> Rejected:
    """Why `ranks` cannot share the batch, in check_layout's words."""
    layout = msgspec.structs.replace(layout, replica=1, shard=ranks, microbatch=1)
    try:
        check_layout(layout, job.data.global_batch)
    except SettingError as error:
        return Rejected(layout=layout, reason=error.reason, nearest=error.nearest)
    raise AssertionError(f"{ranks} ranks divide the batch")


def reject_memory(job: Job, part: Part) -> Rejected:
    """The rejection of a layout that does not fit its device: by how much, and which terms are largest."""
    memory = predict_memory(share_machine(job), part)
    capacity_bytes = share_machine(job).cluster.device.memory_bytes
    largest = sorted(memory.rows(), key=lambda row: -row[1])[:2]
    terms = ", ".join(f"{name.replace('_', ' ')} {gb(size)}" for name, size in largest)
    reason = f"needs {gb(memory.total())} GB of {gb(capacity_bytes)}: {terms}"
    return Rejected(layout=job.layout, reason=reason, nearest="", memory=memory)


def gb(size_bytes: float) -> str:
    """Bytes in GB, as datasheets count them."""
    return f"{size_bytes / 1e9:.1f}"


def name_nearest(rejected: Sequence[Rejected], ranked: Sequence[Prediction]) -> tuple[Rejected, ...]:
    """Memory rejections with the nearest layout that works: as many ranks first, then as large a microbatch."""
    by_ranks: dict[int, list[Prediction]] = {}
    for prediction in ranked:
        by_ranks.setdefault(prediction.layout.world_size, []).append(prediction)

    def nearest(wanted: Layout) -> str:
        def distance(prediction: Prediction) -> tuple[float, ...]:
            layout = prediction.layout
            return (
                abs(layout.microbatch - wanted.microbatch),
                layout.tensor != wanted.tensor,
                layout.shard != wanted.shard,
                abs(layout.zero - wanted.zero),
                prediction.step_s,
            )

        ranks = min(by_ranks, key=lambda ranks: (abs(ranks - wanted.world_size), ranks))
        return min(by_ranks[ranks], key=distance).layout.label()

    return tuple(
        r if r.nearest or not ranked else msgspec.structs.replace(r, nearest=nearest(r.layout)) for r in rejected
    )


def explain_verdict(job: Job, own: Prediction, one: Prediction | None, ranked: Sequence[Prediction]) -> str:
    """Whether one device is enough, how it compares with the best layout and with the job's own."""
    device = "process" if job.cluster.device.kind == "cpu" else "device"
    if not ranked:
        name, size_bytes = max(own.memory.rows(), key=lambda row: row[1])
        largest = f"{name.replace('_', ' ')}, {gb(size_bytes)} GB in this job's layout"
        return f"Nothing fits: no layout of {job.model.name} on {job.cluster.label()}. The largest term is {largest}."
    if one is None:
        fewest = min(ranked, key=lambda p: p.layout.world_size)  # of several, the first in rank
        best = "also the fastest found" if fewest == ranked[0] else f"the fastest found is {in_words(ranked[0])}"
        return (
            f"One {device} is not enough: the model does not fit it. The fewest that work: {in_words(fewest)}; {best}."
        )
    placed = share_machine(msgspec.structs.replace(job, layout=one.layout))
    recompute = "" if one.layout.recompute == "none" else f" with {one.layout.label()}"
    fits = f"it fits{recompute} ({gb(one.memory.total())} of {gb(placed.cluster.device.memory_bytes)} GB)"
    if not one.step_s:
        return f"One {device} is enough: {fits}. How fast is not known, because the device's peak is not."
    best = ranked[0]
    if best.layout.world_size > 1:
        gain, ranks = one.step_s / best.step_s, best.layout.world_size
        return (
            f"One {device} is enough: {fits}, {one.step_s:.3g} s a step. {ranks} are predicted {gain:.3g} times as "
            f"fast ({100 * gain / ranks:.0f}% of linear): {in_words(best)}."
        )
    return f"One {device} is enough: {fits}{compare_own(own, one, device)}."


def compare_own(own: Prediction, one: Prediction, device: str) -> str:
    """How the job's own layout compares with one device that nothing beats."""
    if own.layout.world_size == 1:
        return ", and nothing found is faster" if device == "process" else ""
    gain = own.step_s / one.step_s - 1
    why = ": they would share its cores" if device == "process" else ""
    if gain < TIE:
        return f", and this job's {own.layout.world_size} ranks are predicted no faster{why}"
    return (
        f", and is predicted {100 * gain:.0f}% faster than this job's {own.layout.world_size} ranks "
        f"({one.step_s:.3g} s a step against {own.step_s:.3g} s){why}"
    )


def in_words(prediction: Prediction) -> str:
    """A layout with its speed."""
    if not prediction.step_s:
        return prediction.layout.label()
    return f"{prediction.layout.label()} at {prediction.tokens_per_s:,.0f} tokens/s"
