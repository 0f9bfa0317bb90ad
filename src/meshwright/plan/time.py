"""The predicted step account of a job's layout."""

import msgspec

from meshwright.account import StepAccount
from meshwright.plan.collective import Ring, predict_collective
from meshwright.plan.compute import has_known_peak, predict_optimizer
from meshwright.plan.part import Part, build_part
from meshwright.plan.rates import rates_of
from meshwright.plan.walk import Walk, walk_backward, walk_forward
from meshwright.plan.work import Piece, build_pieces
from meshwright.spec import Job, count_flops

# Loss, gradient norm and a stop request, summed over all ranks once a step.
CONTROL_BYTES = 12


def predict_step(job: Job, part: Part | None = None) -> tuple[StepAccount, dict[str, float]]:
    """Seconds of one step by bucket, and transfers hidden under compute by purpose.

    All zero where the device's peak is not known: a step time would be a guess. part: what build_part gives for the
    job, where the caller has it already.
    """
    device = job.cluster.device
    if not has_known_peak(device, job):
        return StepAccount(), {}
    part = part or build_part(job)
    rates, microbatches = rates_of(device), accumulation_of(job)
    pieces = build_pieces(job, part)
    walk = walk_step(job, pieces)
    useful_s = useful_seconds(job)
    exposed_s = walk.exposed_shard_s + walk.exposed_replica_s + walk.tensor_s
    # FSDP wraps each block, the head and the root. A block that runs again is launched again.
    layers, again = job.model.layers, job.layout.recomputed_layers(job.model.layers)
    launches_s = rates.block_host_s * (layers + again / 2) + rates.group_host_s * (layers + 2)
    launches_s += rates.tensor_host_s * (layers + 1 + again / 2) if job.layout.tensor > 1 else 0.0
    launches_s *= microbatches
    device_s = walk.compute_s + walk.recompute_s + exposed_s
    # A CPU launches and works in turn; a GPU idles only for what the host launches later than it could run.
    late_s = launches_s if device.kind == "cpu" else max(0.0, launches_s - device_s)
    account = StepAccount(
        useful=useful_s,
        inefficiency=walk.compute_s - useful_s,
        recompute=walk.recompute_s,
        optimizer=predict_optimizer(job, part),
        comm_shard=walk.exposed_shard_s,
        comm_replica=walk.exposed_replica_s,
        comm_tensor=walk.tensor_s,
        comm_control=predict_control(job),
        host=late_s + rates.step_s,
    )
    hidden = {
        "shard": walk.shard_s - walk.exposed_shard_s,
        "replica": walk.replica_s - walk.exposed_replica_s,
        "tensor": sum(p.count * p.tensor_hidden_s for p in pieces) * microbatches,
    }
    return account, {purpose: seconds for purpose, seconds in hidden.items() if seconds > 0}


def useful_seconds(job: Job) -> float:
    """One rank's part of a step's model FLOPs at its device's peak; ranks of the tensor axis share their sequences'."""
    sequences = job.data.global_batch // job.layout.data_size
    flops = sequences * count_flops(job.model, job.data.sequence).training() / job.layout.tensor
    return flops / job.cluster.device.peak_flops_per_s(job.layout.precision)


def accumulation_of(job: Job) -> int:
    """Microbatches a rank runs in a step."""
    return job.layout.accumulation(job.data.global_batch)


def walk_step(job: Job, pieces: list[Piece]) -> Walk:
    """All microbatches of a step. What is gathered and reduced in which of them is `zero`'s meaning (spec.Layout)."""
    layout = job.layout
    overlaps = rates_of(job.cluster.device).overlaps
    microbatches = accumulation_of(job)
    # Replicas alone, and zero 1, keep whole parameters and gradients from one microbatch's backward pass to the next.
    holds = layout.shard == 1 or layout.zero == 1

    def pass_over(*, first: bool, last: bool) -> Walk:
        forward = walk_forward(pieces, gathers=first or not holds, overlaps=overlaps)
        reduces = last or not holds
        return forward + walk_backward(
            pieces,
            gathers=layout.zero == 3,
            scatters=reduces,
            all_reduces=last and layout.replica > 1,
            accumulates=holds and microbatches > 1,
            overlaps=overlaps,
        )

    if microbatches == 1:
        return pass_over(first=True, last=True)
    middle = pass_over(first=False, last=False).repeated(microbatches - 2)
    return pass_over(first=True, last=False) + middle + pass_over(first=False, last=True)


def predict_control(job: Job) -> float:
    """The step's one small synchronisation over all ranks."""
    cluster, size = job.cluster, job.layout.world_size
    nodes = -(-size // cluster.devices_per_node)
    across_s = nodes * cluster.inter.latency_s if nodes > 1 else 0.0
    inside_s = (size - nodes if nodes > 1 else size) * cluster.intra.latency_s
    ring = Ring(
        size=size, nodes=nodes, link_bytes_per_s=cluster.intra.bytes_per_s, round_s=(inside_s + across_s) / size
    )
    return predict_collective("all_reduce", CONTROL_BYTES, ring, rates_of(cluster.device))


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
    )
    cluster = msgspec.structs.replace(cluster, device=device, devices_per_node=ranks)
    return msgspec.structs.replace(job, cluster=cluster)
