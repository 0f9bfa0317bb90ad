"""What fits at all: the fewest ranks, the smallest cluster, the longest sequence and the largest model.

Memory alone is asked about, of the layouts that need least of it: all recomputed, a sequence at a time, parameters
divided over all ranks. Nothing is offloaded, unless that is fixed.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from meshwright.plan.fit import host_refusal, missing_bytes, with_layout
from meshwright.plan.frame import build_frame
from meshwright.plan.part import STATE_BYTES
from meshwright.plan.space import Space
from meshwright.spec import Cluster, Job, Layout, ModelSpec, SettingError, check_model, count_parameters
from meshwright.spec.model import check_sequence

# Clusters of as many nodes as this are tried at most, and nodes are filled up to so many devices first.
MOST_NODES = 4096
USUAL_NODE = 8
# Steps of what is looked for between two powers of two, and powers that are tried.
STEPS = 8
MOST_DOUBLINGS = 24

Fixed = Mapping[str, Any]


def least_layout(job: Job, ranks: int, fixed: Fixed | None = None) -> Layout | None:
    """A layout of so many ranks that fits, if any does; pipelines last, since of them each is the harder to run."""
    if lacks_memory(job, ranks, fixed):
        return None
    return next((one for one in slim_layouts(job, ranks, fixed) if holds(with_layout(job, one))), None)


def is_divisible(job: Job, fixed: Fixed | None = None) -> bool:
    """Whether the devices and the batch can be divided as is fixed at all, whatever fits."""
    return any(True for ranks in Space(job).ranks() for _ in slim_layouts(job, ranks, fixed))


def slim_layouts(job: Job, ranks: int, fixed: Fixed | None) -> Iterator[Layout]:
    """The legal layouts of so many ranks that need the least memory of their grids."""
    space = Space(job, {"offload": "none", "microbatch": 1, "recompute": "full", **(fixed or {})})
    for grid in sorted(space.grids(ranks), key=lambda grid: (grid.pipeline, grid.context, grid.tensor)):
        for sharing in space.sharings(grid):
            layout = msgspec.structs.replace(sharing, **space.fixed)
            whole = sharing.replica == 1 or "shard" in space.fixed or "replica" in space.fixed
            if whole and space.refusal(layout) is None:
                yield layout


def holds(job: Job) -> bool:
    """Whether devices and hosts have the memory for the job's layout."""
    return host_refusal(job, build_frame) is None and missing_bytes(job, build_frame) <= 0


def lacks_memory(job: Job, ranks: int, fixed: Fixed | None) -> bool:
    """Whether masters, gradients and states alone need more than all devices have together."""
    device = job.cluster.device
    if (fixed or {}).get("offload", "none") != "none" or device.kind == "cpu":
        return False
    numbers = 4 if job.optimizer.name == "adamw" else 2
    return numbers * STATE_BYTES * count_parameters(job.model) > ranks * device.memory_bytes


def fewest_ranks(job: Job, fixed: Fixed | None = None) -> int | None:
    """The fewest of the cluster's devices that hold the job; None where all of them do not."""
    return next((ranks for ranks in Space(job).ranks() if least_layout(job, ranks, fixed) is not None), None)


def smallest_cluster(job: Job, fixed: Fixed | None = None) -> tuple[Cluster, Layout] | None:
    """The smallest cluster of the same devices and links that holds the job: a node is filled up, then nodes double."""
    for cluster in larger_clusters(job.cluster):
        layout = least_layout(msgspec.structs.replace(job, cluster=cluster), cluster.devices, fixed)
        if layout is not None:
            return cluster, layout
    return None


def larger_clusters(cluster: Cluster) -> Iterator[Cluster]:
    """Clusters that this one could grow to."""
    per_node = cluster.devices_per_node
    if cluster.nodes == 1:
        sizes = [1 << power for power in range(USUAL_NODE.bit_length()) if per_node < 1 << power <= USUAL_NODE]
        for size in sizes:
            yield msgspec.structs.replace(cluster, devices_per_node=size)
        per_node = max(per_node, USUAL_NODE)
    nodes = 1 << cluster.nodes.bit_length()
    while nodes <= MOST_NODES:
        yield msgspec.structs.replace(cluster, nodes=nodes, devices_per_node=per_node)
        nodes *= 2


def longest_sequence(job: Job, fixed: Fixed | None = None) -> int | None:
    """Tokens of the longest sequence that some layout on all devices holds, at the job's batch in sequences.

    Looked for in powers of two times the job's, then in eighths of the last one. None where not even the job's fits.
    """

    def at(eighths: int) -> Job | None:
        sequence = job.data.sequence * eighths // STEPS
        try:
            check_sequence(job.model, sequence)
        except SettingError:
            return None
        return msgspec.structs.replace(job, data=msgspec.structs.replace(job.data, sequence=sequence))

    most = most_that_fits(at, job.cluster.devices, fixed)
    return None if most is None else job.data.sequence * most // STEPS


def largest_model(job: Job, fixed: Fixed | None = None) -> ModelSpec | None:
    """The largest model of the job's shape that some layout on all devices holds.

    Blocks and heads grow by the same factor, and with heads the model's and the feed-forward part's widths; the size of
    a head, the number of key heads, experts and the vocabulary stay. The factor is looked for as a sequence's length.
    """

    def at(eighths: int) -> Job | None:
        model = scale_model(job.model, eighths)
        try:
            check_model(model)
        except SettingError:
            return None
        return msgspec.structs.replace(job, model=model)

    most = most_that_fits(at, job.cluster.devices, fixed)
    return None if most is None else scale_model(job.model, most)


def scale_model(model: ModelSpec, eighths: int) -> ModelSpec:
    """The model with so many eighths of its blocks and of its width."""
    # Key heads divide heads.
    heads = max(1, model.heads * eighths // STEPS // model.kv_heads) * model.kv_heads
    return msgspec.structs.replace(
        model,
        name=f"{model.name} x {eighths / STEPS:g}",
        layers=max(1, model.layers * eighths // STEPS),
        heads=heads,
        d_model=model.d_model * heads // model.heads,
        feed_forward=model.feed_forward * heads // model.heads,
    )


def most_that_fits(at: Callable[[int], Job | None], devices: int, fixed: Fixed | None) -> int | None:
    """The most eighths of a job that fit so many devices: doubled while it does, then by halves between."""

    def fits(eighths: int) -> bool:
        job = at(eighths)
        return job is not None and least_layout(job, devices, fixed) is not None

    low = STEPS
    if not fits(low):
        return None
    for _ in range(MOST_DOUBLINGS):
        if not fits(2 * low):
            break
        low *= 2
    step = low // 2
    # No finer than an eighth of what was reached.
    while step >= max(1, low // STEPS):
        low, step = (low + step if fits(low + step) else low), step // 2
    return low
