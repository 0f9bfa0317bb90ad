"""What nodes that are not alike reach together, and each kind of them alone."""

from collections.abc import Callable, Sequence
from math import gcd

import msgspec

from meshwright.record import Prediction
from meshwright.spec import Cluster, Job, Nodes

# A step is this much shorter before one kind of nodes is said to do better alone.
CLEARLY = 0.01


class Alone(msgspec.Struct, frozen=True, kw_only=True):
    """The nodes of one kind without the others: which, and the best layout on them; None where nothing fits."""

    nodes: Nodes
    best: Prediction | None


def plan_alone(job: Job, best_of: Callable[[Job], Prediction | None]) -> tuple[Alone, ...]:
    """Each kind of the job's nodes by itself; nothing where all are alike. best_of: the first in rank of a job's."""
    return tuple(Alone(nodes=nodes, best=best_of(move(job, nodes))) for nodes in job.cluster.groups)


def move(job: Job, nodes: Nodes) -> Job:
    """The job on these nodes alone."""
    cluster = Cluster(
        device=nodes.device,
        nodes=nodes.nodes,
        devices_per_node=nodes.devices_per_node,
        intra=nodes.intra,
        inter=job.cluster.inter,
    )
    return msgspec.structs.replace(job, cluster=cluster)


def explain_uneven(job: Job, first: Prediction | None, alone: Sequence[Alone]) -> str:
    """How nodes that are not alike are planned, and whether some of them would do better without the others."""
    cluster = job.cluster
    if not alone:
        return ""
    whole = gcd(*(nodes.devices_per_node for nodes in cluster.groups))
    cut = any(nodes.devices_per_node != whole for nodes in cluster.groups)
    mixed = len({nodes.device for nodes in cluster.groups}) > 1
    how = [f"{cluster.plain().label()} joined by the network"] if cut else []
    how += ["every rank as fast as the slowest device, with the least memory of any"] if mixed else []
    text = f"Nodes are not alike; planned for: {', and '.join(how) or 'the slower links'}."
    if first is not None and not first.step_s:
        # Without known peaks nothing is faster than anything.
        return text
    better = [one for one in alone if one.best is not None and is_better(one.best, first)]
    if better:
        best = max(better, key=lambda one: one.best.tokens_per_s if one.best is not None else 0.0)
        assert best.best is not None
        speed = f" at {best.best.tokens_per_s:,.0f} tokens/s" if best.best.step_s else ""
        return f"{text} {best.nodes.label()} alone do better: {best.best.layout.label()}{speed}."
    return f"{text} No kind of them does better alone."


def is_better(best: Prediction, first: Prediction | None) -> bool:
    """Whether a layout on some of the nodes is clearly faster than the best on all, or the only one that fits."""
    return first is None or best.step_s < (1 - CLEARLY) * first.step_s
