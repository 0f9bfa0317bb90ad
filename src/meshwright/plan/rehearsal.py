"""Rehearsing one rank: which one, how long its transfers are predicted to take, what is predicted for it, and what
takes the place of the plan's figures once it has been rehearsed."""

from collections.abc import Callable, Sequence
from itertools import product

import msgspec

from meshwright.account import MemoryAccount, StepAccount
from meshwright.plan.collective import Ring, hop_seconds, place_ring, predict_collective, predict_exchange, stride_of
from meshwright.plan.compute import has_known_peak, predict_optimizer
from meshwright.plan.frame import build_frame
from meshwright.plan.held import predict_states
from meshwright.plan.interval import memory_interval, step_interval
from meshwright.plan.memory import NCCL_BYTES, predict_memories
from meshwright.plan.passes import walk_stages
from meshwright.plan.rates import Collective, rates_of
from meshwright.plan.time import accumulation_of, predict_control, share_machine
from meshwright.plan.walk import Walk
from meshwright.record import Curve, GroupPace, Kind, Prediction, Rehearsal
from meshwright.spec import AXES, Axis, Job, Layout, SettingError, rank_flops

# Where curves have their points: powers of two from 1 KiB to 1 TiB, straight between them as predictions are.
SIZES = (0.0, *(2.0**power for power in range(10, 41)))
RINGED: tuple[Collective, ...] = ("all_reduce", "all_gather", "reduce_scatter")
# Buckets of a step that a rank by itself does not have: it waits for nobody. They stay the plan's.
WAITING = ("comm_pipeline", "imbalance", "straggler", "bubble")

NOTE = (
    "rehearsed: rank {rank}'s compute and memory were measured on {device}; transfers between ranks, and waiting for "
    "other stages, are predictions; so are all other layouts"
)
MEMORY_NOTE = (
    "rehearsed: rank {rank}'s memory was measured on {device}; times are predictions, for the cluster's devices are "
    "others ({planned})"
)


def fullest_rank(job: Job) -> int:
    """The rank that is predicted to need most memory; of several, the first."""
    job = share_machine(job)
    totals = [memory.total() for memory in predict_memories(job, build_frame(job))]
    return totals.index(max(totals)) * stride_of(job.layout, "pipeline")


def rank_memory(job: Job, rank: int) -> MemoryAccount:
    """Predicted bytes of one rank of the world at its peak; its states to the byte."""
    job = share_machine(job)
    along = job.layout.coordinates(rank)["pipeline"]
    memory, states = predict_memories(job, build_frame(job))[along], predict_states(job, rank)
    return msgspec.structs.replace(
        memory,
        parameters=states.parameters,
        gradients=states.gradients,
        optimizer_states=states.optimizer_states,
    )


def library_bytes(job: Job) -> float:
    """What the communication library holds, which has nothing to hold in a rehearsal; on a CPU too little to tell."""
    return NCCL_BYTES if job.cluster.device.kind != "cpu" and job.layout.world_size > 1 else 0.0


def rank_step(job: Job, rank: int) -> StepAccount:
    """Predicted seconds of one rank's step without its waiting for others; all zero where the device's peak is unknown.

    What the plan's account of a layout has as the mean over ranks along pipeline, for one of them.
    """
    job = share_machine(job)
    device, layout = job.cluster.device, job.layout
    if not has_known_peak(device, job):
        return StepAccount()
    along, microbatches, frame = layout.coordinates(rank)["pipeline"], accumulation_of(job), build_frame(job)
    stages = walk_stages(job, frame)
    part = frame.parts[along]
    walk, host_s = Walk(), rates_of(job.cluster).step_s
    for stage in (stages[held.index] for held in part.stages):
        walk = walk + stage.first + stage.last + stage.middle.repeated(microbatches - 1)
        host_s += stage.host_s(microbatches)
    flops = rank_flops(job.model, layout, job.data.sequence, along) * job.data.global_batch
    useful_s = flops * layout.pipeline / layout.world_size / device.peak_flops_per_s(layout.precision)
    return StepAccount(
        useful=useful_s,
        contention=walk.contention_s,
        inefficiency=walk.compute_s - useful_s,
        recompute=walk.recompute_s,
        optimizer=predict_optimizer(job, part.local),
        comm_shard=walk.exposed_shard_s,
        comm_replica=walk.exposed_replica_s,
        comm_tensor=walk.tensor_s,
        comm_context=walk.context_s,
        comm_expert=walk.expert_s,
        comm_control=predict_control(job),
        host=host_s,
    )


def build_paces(job: Job, rank: int) -> tuple[GroupPace, ...]:
    """How long the transfers of every group that a rank is in take, as the plan reckons them."""
    job = share_machine(job)
    groups: set[tuple[int, ...]] = {tuple(sorted(group)) for group in groups_of(job.layout, rank)}
    paces: dict[tuple[int, ...], dict[Kind, Curve]] = {
        ranks: group_curves(job, ranks) for ranks in sorted(groups) if len(ranks) > 1
    }
    for ranks, sent in pair_curves(job, rank).items():
        # Two ranks may be a group too.
        paces[ranks] = {**paces.get(ranks, {}), **sent}
    return tuple(GroupPace(ranks=ranks, curves=curves) for ranks, curves in paces.items())


def groups_of(layout: Layout, rank: int) -> list[list[int]]:
    """The ranks of the world along each axis, along shard and context together, of the experts' two, and all."""
    experts = experts_along(layout, rank)
    place = experts.index(rank)
    first = place // layout.expert * layout.expert
    return [
        *(along(layout, rank, (axis,)) for axis in AXES),
        along(layout, rank, ("shard", "context")),
        experts[first : first + layout.expert],
        experts[place % layout.expert :: layout.expert],
        list(range(layout.world_size)),
    ]


def experts_along(layout: Layout, rank: int) -> list[int]:
    """The ranks that hold a mixture's experts once, in the order in which experts are divided over them."""
    return along(layout, rank, ("shard", "context", "tensor"))


def along(layout: Layout, rank: int, axes: Sequence[Axis]) -> list[int]:
    """The rank's group along these axes together, the last of them fastest."""
    places = layout.coordinates(rank)
    base = rank - sum(places[axis] * stride_of(layout, axis) for axis in axes)
    steps = [[place * stride_of(layout, axis) for place in range(layout.size(axis))] for axis in axes]
    return [base + sum(each) for each in product(*steps)]


def group_curves(job: Job, ranks: tuple[int, ...]) -> dict[Kind, Curve]:
    """Of a group, wherever the cluster has its ranks."""
    cluster, rates = job.cluster, rates_of(job.cluster)
    ring = place_ring(ranks, job.layout.world_size, cluster)

    def collective(kind: Collective) -> Curve:
        return curve(lambda size_bytes: predict_collective(kind, size_bytes, ring, rates))

    curves: dict[Kind, Curve] = {kind: collective(kind) for kind in RINGED}
    curves["all_to_all"] = curve(lambda size_bytes: predict_exchange(size_bytes, ring, cluster, rates))
    curves["pass"] = curve(lambda size_bytes: pass_seconds(job, ring, size_bytes))
    return curves


def pass_seconds(job: Job, ring: Ring, size_bytes: float) -> float:
    """A turn of a ring: all send at once, so that it lasts as long as the slowest hop."""
    link = job.cluster.inter if ring.nodes > 1 else job.cluster.intra
    return size_bytes / (link.bytes_per_s * rates_of(job.cluster).links["send"]) + link.latency_s


def pair_curves(job: Job, rank: int) -> dict[tuple[int, ...], dict[Kind, Curve]]:
    """Of a message to each other rank along pipeline."""
    layout, rates = job.layout, rates_of(job.cluster)
    pipe, own = along(layout, rank, ("pipeline",)), layout.coordinates(rank)["pipeline"]

    def to(place: int) -> dict[Kind, Curve]:
        return {"send": curve(lambda size_bytes: hop_seconds(layout, job.cluster, (own, place), size_bytes, rates))}

    return {tuple(sorted((rank, other))): to(place) for place, other in enumerate(pipe) if other != rank}


def curve(predict_s: Callable[[float], float]) -> Curve:
    """A prediction at SIZES."""
    return tuple((size_bytes, predict_s(size_bytes)) for size_bytes in SIZES)


def check_rehearsal(job: Job, rehearsal: Rehearsal) -> None:
    """Raise SettingError where a rehearsal is of another job."""
    for what, wanted, found, told in (
        ("model", job.model, rehearsal.model, rehearsal.model.name),
        ("layout", job.layout, rehearsal.layout, rehearsal.layout.label()),
        ("data.sequence", job.data.sequence, rehearsal.sequence, f"{rehearsal.sequence:,}"),
        ("data.global_batch", job.data.global_batch, rehearsal.global_batch, f"{rehearsal.global_batch:,}"),
    ):
        if wanted != found:
            raise SettingError("--rehearsed", f"is of another {what} ({told})", "meshwright rehearse with this job")


def rehearsed_memories(memories: Sequence[MemoryAccount], job: Job, rehearsal: Rehearsal) -> tuple[MemoryAccount, ...]:
    """Of every rank along pipeline: the rehearsed one's as it was, the others' off by as much as that."""
    own = job.layout.coordinates(rehearsal.rank)["pipeline"]
    return tuple(
        rehearsal.memory if place == own else with_measured_memory(memory, rehearsal)
        for place, memory in enumerate(memories)
    )


def with_rehearsal(job: Job, prediction: Prediction, rehearsal: Rehearsal) -> Prediction:
    """The layout's prediction with what was rehearsed in the place of what was predicted.

    A pipeline's ranks are not alike: what the rehearsed one took of its prediction, the others are taken to take of
    theirs, and waiting for each other grows with it. Times stay the plan's where the rehearsal's device is another.
    """
    job = share_machine(job)
    memories = rehearsed_memories(predict_memories(job, build_frame(job)), job, rehearsal)
    memory = max(memories, key=MemoryAccount.total)
    same_device = rehearsal.device == job.cluster.device.name
    note = NOTE if same_device else MEMORY_NOTE
    step, overlapped = prediction.step, prediction.overlapped
    # Where no peak is known nothing is, but what a rank waits for in a pipeline.
    if same_device and (prediction.step_s or job.layout.pipeline == 1):
        step = with_measured(prediction.step, rehearsal)
        overlapped = {name: seconds for name, seconds in rehearsal.overlapped.items() if seconds}
    step_s = step.total()
    return msgspec.structs.replace(
        prediction,
        step=step,
        overlapped=overlapped,
        memory=memory,
        step_s=step_s,
        step_interval_s=step_interval(job, step),
        memory_interval_bytes=memory_interval(job, memory),
        tokens_per_s=job.data.global_batch * job.data.sequence / step_s if step_s else 0.0,
        notes=(
            note.format(rank=rehearsal.rank, device=rehearsal.device, planned=job.cluster.device.name),
            *prediction.notes,
        ),
    )


def with_measured(mean: StepAccount, rehearsal: Rehearsal) -> StepAccount:
    """The mean rank's account, its own work as rehearsed: the profiled step's parts of the steps that were not."""
    predicted = rehearsal.predicted
    measured = rehearsal.measured.scaled(rehearsal.step_s / rehearsal.measured.total())

    def more(name: str) -> float:
        own, before, after = (getattr(account, name) for account in (mean, predicted, measured))
        return max(0.0, own + after - before)

    made = StepAccount(**{name: more(name) for name in mean.__struct_fields__ if name not in WAITING})
    # What stands in for a transfer slows nothing beside it down as the real one will.
    contention_s = max(mean.contention, made.contention)
    kernels_s = in_proportion(*(account.compute - account.contention for account in (mean, predicted, measured)))
    made = msgspec.structs.replace(
        made,
        useful=mean.useful,
        contention=contention_s,
        inefficiency=kernels_s - mean.useful,
        recompute=in_proportion(mean.recompute, predicted.recompute, measured.recompute),
        optimizer=in_proportion(mean.optimizer, predicted.optimizer, measured.optimizer),
    )
    alone_s = mean.total() - sum(getattr(mean, name) for name in WAITING)
    slower = made.total() / alone_s if alone_s else 1.0
    return msgspec.structs.replace(made, **{name: getattr(mean, name) * slower for name in WAITING})


def with_measured_memory(other: MemoryAccount, rehearsal: Rehearsal) -> MemoryAccount:
    """The account of another rank than the one that was rehearsed."""
    predicted, measured = rehearsal.predicted_memory, rehearsal.memory
    names = other.__struct_fields__
    return MemoryAccount(
        **{name: in_proportion(*(getattr(one, name) for one in (other, predicted, measured))) for name in names}
    )


def in_proportion(own: float, before: float, after: float) -> float:
    """`own` as many times as `after` is `before`; of what was not predicted, what is there."""
    return own * after / before if before > 0 else own + after
