"""The predicted step account of a job's layout."""

import msgspec

from meshwright.account import StepAccount
from meshwright.plan.collective import Ring, predict_collective
from meshwright.plan.compute import has_known_peak, predict_optimizer
from meshwright.plan.frame import Frame, build_frame
from meshwright.plan.passes import StageWalks, walk_data, walk_stages
from meshwright.plan.pipeline import Idle, explain_idle
from meshwright.plan.rates import rates_of
from meshwright.plan.walk import Walk
from meshwright.spec import Job, count_flops

# Loss, gradient norm and a stop request, summed over all ranks once a step.
CONTROL_BYTES = 12


def predict_step(job: Job, frame: Frame | None = None, *, brief: bool = False) -> tuple[StepAccount, dict[str, float]]:
    """Seconds of one step by bucket, the mean over a pipeline's ranks, and transfers hidden under compute by purpose.

    All zero where the device's peak is not known: a step time would be a guess. frame: what build_frame gives for the
    job, where the caller has it already. brief: for the step's sum alone, with all that a pipeline waits for as bubble.
    """
    device = job.cluster.device
    if not has_known_peak(device, job):
        return StepAccount(), {}
    frame = frame or build_frame(job)
    rates, microbatches, ranks = rates_of(job.cluster), accumulation_of(job), job.layout.pipeline
    stages = walk_stages(job, frame)
    walk = mean_walk(stages, microbatches, ranks)
    host_s = sum(stage.host_s(microbatches) for stage in stages) / ranks
    idle = explain_idle(job, frame, stages, walk.busy_s() + host_s, brief=brief)
    useful_s = useful_seconds(job)
    optimizers = [predict_optimizer(job, part.local) for part in frame.parts]
    optimizer_s = sum(optimizers) / ranks
    data = [walk_data(job, part, stages) for part in frame.parts]
    shard_s, replica_s = (sum(each) / ranks for each in ([d.shard_s for d in data], [d.replica_s for d in data]))
    closing = [optimizer + d.shard_s + d.replica_s for optimizer, d in zip(optimizers, data, strict=True)]
    account = StepAccount(
        useful=useful_s,
        contention=walk.contention_s,
        inefficiency=walk.compute_s - useful_s,
        recompute=walk.recompute_s,
        optimizer=optimizer_s,
        comm_shard=walk.exposed_shard_s + shard_s,
        comm_replica=walk.exposed_replica_s + replica_s,
        comm_tensor=walk.tensor_s,
        comm_context=walk.context_s,
        comm_expert=walk.expert_s,
        comm_pipeline=idle.transfers_s,
        comm_control=predict_control(job),
        imbalance=walk.uneven_s + idle.imbalance_s + max(closing) - sum(closing) / ranks,
        bubble=idle.bubble_s,
        host=host_s + rates.step_s,
    )
    return account, hidden_seconds(stages, walk, idle, microbatches, ranks)


def hidden_seconds(stages: list[StageWalks], walk: Walk, idle: Idle, microbatches: int, ranks: int) -> dict[str, float]:
    """Transfers that run while the device computes, by purpose."""
    inside = {
        name.removesuffix("_s"): sum(getattr(stage.hidden, name) for stage in stages) * microbatches / ranks
        for name in ("tensor_s", "context_s")
    }
    hidden = {
        "shard": walk.shard_s - walk.exposed_shard_s,
        "replica": walk.replica_s - walk.exposed_replica_s,
        **inside,
        "pipeline": idle.sent_s - idle.transfers_s,
    }
    return {purpose: seconds for purpose, seconds in hidden.items() if seconds > 0}


def useful_seconds(job: Job) -> float:
    """One rank's part of a step's model FLOPs at its device's peak; ranks that share sequences share theirs."""
    layout = job.layout
    sequences = job.data.global_batch / layout.data_size
    sharing = layout.pipeline * layout.context * layout.tensor
    flops, device = count_flops(job.model, job.data.sequence), job.cluster.device
    products = 3 * job.model.layers * flops.block_matmul
    seconds = products / device.peak_flops_per_s(layout.precision)
    seconds += (flops.training() - products) / device.peak_flops_per_s(layout.plain_precision)
    return sequences * seconds / sharing


def accumulation_of(job: Job) -> int:
    """Microbatches a rank runs in a step."""
    return job.layout.accumulation(job.data.global_batch)


def mean_walk(stages: list[StageWalks], microbatches: int, ranks: int) -> Walk:
    """All passes of a step, of the mean rank along pipeline."""
    whole = Walk()
    for stage in stages:
        whole = whole + stage.first + stage.last + stage.middle.repeated(microbatches - 1)
    return whole if ranks == 1 else whole.repeated(1 / ranks)


def predict_control(job: Job) -> float:
    """The step's one small synchronisation over all ranks."""
    cluster, size = job.cluster, job.layout.world_size
    nodes = -(-size // cluster.devices_per_node)
    across_s = nodes * cluster.inter.latency_s if nodes > 1 else 0.0
    inside_s = (size - nodes if nodes > 1 else size) * cluster.intra.latency_s
    ring = Ring(
        size=size, nodes=nodes, link_bytes_per_s=cluster.intra.bytes_per_s, round_s=(inside_s + across_s) / size
    )
    return predict_collective("all_reduce", CONTROL_BYTES, ring, rates_of(cluster))


def share_machine(job: Job) -> Job:
    """The job with its cluster cut to the layout's ranks where ranks share a machine's cores.

    A CPU device row is one process's share: fewer processes than the row assumes have more each.
    """
    cluster, ranks = job.cluster, job.layout.world_size
    if cluster.device.kind != "cpu" or cluster.nodes > 1 or ranks >= cluster.devices_per_node:
        return job
    more = cluster.devices_per_node / ranks
    device = cluster.device
    device = msgspec.structs.replace(
        device,
        memory_bytes=device.memory_bytes * more,
        memory_bytes_per_s=device.memory_bytes_per_s * more,
        peak_bf16_flops_per_s=device.peak_bf16_flops_per_s * more,
        peak_fp32_flops_per_s=device.peak_fp32_flops_per_s * more,
        peak_fp16_flops_per_s=device.peak_fp16_flops_per_s * more,
        peak_fp8_flops_per_s=device.peak_fp8_flops_per_s * more,
    )
    cluster = msgspec.structs.replace(cluster, device=device, devices_per_node=ranks)
    return msgspec.structs.replace(job, cluster=cluster)
