"""How a job scales: the best layout of each number of devices, where more stop paying, and how large a batch may be."""

from collections.abc import Sequence

import msgspec

from meshwright.plan.objective import Goal
from meshwright.plan.search import Predict, search_layouts
from meshwright.plan.space import axis_sizes
from meshwright.record import Prediction
from meshwright.spec import Cluster, Job, Layout

# The knee is the most devices that are used this well, against the number that is used best.
KNEE = 0.8


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """The fastest layout of one number of devices.

    efficiency: its speed a device, of that with the number of devices that are used best. device_s_per_million_tokens:
    seconds of one device.
    """

    devices: int
    layout: Layout
    step_s: float
    step_interval_s: tuple[float, float]
    tokens_per_s: float
    efficiency: float
    device_s_per_million_tokens: float


class Noise(msgspec.Struct, frozen=True, kw_only=True):
    """What the gradient noise scale says of batches (arXiv:1812.06162): a batch of so many tokens learns as much from
    each as a small one does, divided by 1 + batch / noise scale.

    noise_tokens: beyond a batch of as many half of all tokens are spent on noise, and twice the replicas train at
    most a third sooner. batch_efficiency: of the job's batch. devices: of the fastest layout, beyond which replicas
    of a sequence each make the batch larger than that.
    """

    noise_tokens: float
    batch_efficiency: float
    devices: int


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """points: from few devices to many, none where nothing fits. knee: devices of the last point above KNEE."""

    points: tuple[Point, ...]
    knee: int | None
    noise: Noise | None = None


def build_curve(job: Job, predict: Predict, goal: Goal) -> Curve:
    """Search every number of devices on its own, at the job's batch."""
    bests: list[Prediction] = []
    for ranks in curve_sizes(job.cluster):
        found, _ = search_layouts(job, predict, fixed=goal.fixed, ranks=[ranks], most=1)
        bests += [min(found, key=lambda p: p.step_s)] if found else []
    bests = [best for best in bests if best.step_s] or bests
    most = max((best.tokens_per_s / best.layout.world_size for best in bests), default=0.0)
    points = [point_of(best, most) for best in bests if best.step_s]
    good = [point.devices for point in points if point.efficiency >= KNEE]
    noise = None if goal.noise_tokens is None else explain_noise(job, bests, goal.noise_tokens)
    return Curve(points=tuple(points), knee=max(good, default=None), noise=noise)


def curve_sizes(cluster: Cluster) -> list[int]:
    """Powers of two of devices inside a node and all of them; then of nodes, and all nodes."""
    inside, nodes = cluster.devices_per_node, cluster.nodes
    powers = [size for size in axis_sizes(inside) if size & (size - 1) == 0 or size == inside]
    whole = [1 << power for power in range(nodes.bit_length()) if 1 << power <= nodes]
    return sorted({*powers, *(inside * count for count in (*whole, nodes))})


def point_of(best: Prediction, most: float) -> Point:
    """A point of the curve on which a device does `most` tokens a second at best."""
    devices = best.layout.world_size
    per_device = best.tokens_per_s / devices
    return Point(
        devices=devices,
        layout=best.layout,
        step_s=best.step_s,
        step_interval_s=best.step_interval_s,
        tokens_per_s=best.tokens_per_s,
        efficiency=per_device / most,
        device_s_per_million_tokens=1e6 / per_device,
    )


def explain_noise(job: Job, bests: Sequence[Prediction], noise_tokens: float) -> Noise | None:
    """What a noise scale says of the job's batch and of more replicas; None where nothing fits."""
    if not bests:
        return None
    layout = min(bests, key=lambda p: p.step_s).layout
    batch_tokens = job.data.global_batch * job.data.sequence
    # Each replica has a sequence at least.
    replicas = max(1, int(noise_tokens // job.data.sequence))
    return Noise(
        noise_tokens=noise_tokens,
        batch_efficiency=1 / (1 + batch_tokens / noise_tokens),
        devices=replicas * layout.pipeline * layout.context * layout.tensor,
    )
