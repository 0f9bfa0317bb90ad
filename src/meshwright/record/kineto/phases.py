"""What a program was at, on the host: as its annotations say, or, where they do not, as what PyTorch notes by itself
lets one tell."""

from bisect import bisect_right
from collections.abc import Sequence

import msgspec

from meshwright.account.intervals import Interval, union
from meshwright.record.kineto.marks import LOADER, OPTIMIZER, OPTIMIZER_STEP, PHASES, PREFIX, SHARDING, WRAPPING, span
from meshwright.record.kineto.steps import HostStep
from meshwright.record.kineto.trace import Event
from meshwright.record.kineto.walk import Walk

# Phases that only a program that annotates all of its step has.
WHOLE = ("forward", "backward", "optimizer")


class Phases(msgspec.Struct, frozen=True, kw_only=True):
    """The phases of one step, each as sorted, disjoint intervals on the host.

    during: by phase; one that the program does not show is empty. told: the program annotates its passes itself.
    sharding: inside of FSDP's own work; stacks: on a mixture's experts, which lie on other ranks than the rest.
    outside: surely not in a pass over the model.
    """

    during: dict[str, list[Interval]]
    told: bool
    sharding: list[Interval]
    stacks: list[Interval]
    outside: list[Interval]


def phases_of(marks: Sequence[Event], walk: Walk, step: HostStep) -> Phases:
    """The phases of a step, from its annotations and a walk over its operators."""
    told = {name: union(span(m) for m in marks if m.name == PREFIX + name) for name in PHASES}
    sharding = [m for m in marks if m.name.startswith(SHARDING) and not m.name.startswith(WRAPPING)]
    stacks = union(span(m) for m in sharding if ".experts" in m.name)
    if any(told[name] for name in WHOLE):
        passes = union([*told["forward"], *told["backward"]])
        outside = gaps_between(passes, step)
        return Phases(during=told, told=True, sharding=union(map(span, sharding)), stacks=stacks, outside=outside)
    loading = [span(m) for m in marks if m.name.startswith(LOADER)]
    during = {
        **told,
        "input": union([*told["input"], *loading]),
        "backward": walk.backward,
        "recompute": union([*told["recompute"], *walk.recompute]),
        "optimizer": updating(marks, sharding, walk),
    }
    updates = [m.end_s for m in marks if m.name.startswith(OPTIMIZER_STEP)]
    closing = [(max(updates), step.end_s)] if updates else []
    outside = union([*during["optimizer"], *during["input"], *during["checkpoint"], *closing])
    return Phases(during=during, told=False, sharding=union(map(span, sharding)), stacks=stacks, outside=outside)


def updating(marks: Sequence[Event], sharding: Sequence[Event], walk: Walk) -> list[Interval]:
    """When parameters are updated: from the end of the backward pass, since what follows it is done to gradients.

    The gradients' norm, clipping, and the scaler's checks. An optimizer that is given a closure, as by Lightning, makes
    both passes within its step, of which what comes after them is the update.
    """
    nodes = [end for _, end in walk.backward]
    found: list[Interval] = []
    for start, end in (span(m) for m in marks if m.name.startswith(OPTIMIZER)):
        position = bisect_right(nodes, end) - 1
        found.append((max(start, nodes[position]) if position >= 0 else start, end))
    # What DistributedDataParallel and FSDP do at the end of the backward pass belongs to it.
    settling = [span(m) for m in sharding if "backward" in m.name]
    ends = sorted(end for _, end in (*walk.backward, *walk.reducing, *settling))
    for update in marks:
        if update.name.startswith(OPTIMIZER_STEP):
            position = bisect_right(ends, update.start_s) - 1
            if position >= 0:
                found.append((ends[position], update.start_s))
    return union(found)


def gaps_between(passes: Sequence[Interval], step: HostStep) -> list[Interval]:
    """The step without some sorted, disjoint intervals; their own ends belong to them."""
    edges = [step.begin_s, *(moment for interval in passes for moment in interval), step.end_s]
    return [(begin, end) for begin, end in zip(edges[::2], edges[1::2], strict=True) if begin < end]
