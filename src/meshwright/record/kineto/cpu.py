"""A CPU rank's step: the process is its own device.

Operators on the training thread are compute, a collective blocks it from its launch to its end, and Python between
operators is `host`.
"""

from collections.abc import Mapping, Sequence

from meshwright.account import Purpose, Transfer
from meshwright.account.intervals import Interval, intersect, subtract, union
from meshwright.record.kineto.events import EXPERT, TraceEvent, phases, span, within
from meshwright.record.timeline import Timeline, numbered

# Operator namespaces that are not work on data: the autograd engine's brackets and the collectives themselves.
NOT_COMPUTE = ("autograd", "c10d", "_c10d_functional", "profiler")


def cpu_timeline(
    events: Sequence[TraceEvent],
    groups: Mapping[str, tuple[str, tuple[int, ...]]],
) -> Timeline:
    """The last step of a CPU trace."""
    step, during = phases(events)
    thread = step["tid"]
    start, end = span(step)
    mine = [e for e in events if e.get("tid") == thread and e.get("cat") in ("cpu_op", "user_annotation")]
    inside = [e for e in mine if start <= span(e)[0] <= end]
    transfers = collectives(inside, [e for e in events if str(e["name"]).startswith("gloo:")], during, groups)
    moving = union([(t.start_s, t.end_s) for t in transfers])
    operators = subtract(union(span(e) for e in inside if is_compute(e)), moving)
    waiting = {name: during[name] for name in ("input", "checkpoint")}
    working = subtract(operators, union([*waiting["input"], *waiting["checkpoint"]]))
    updating, again = intersect(working, during["optimizer"]), intersect(working, during["recompute"])
    python = union([i for name in ("forward", "backward", "optimizer", "control") for i in during[name]])
    return Timeline(
        start_s=start,
        end_s=end,
        busy={"optimizer": updating, "recompute": again, "compute": subtract(working, union([*updating, *again]))},
        waits={**waiting, "host": subtract(subtract(python, working), moving)},
        transfers=transfers,
        contention_s=0.0,
    )


def is_compute(event: TraceEvent) -> bool:
    """Whether an event is an operator at work on data."""
    namespace, separator, _ = str(event["name"]).partition("::")
    return event["cat"] == "cpu_op" and bool(separator) and namespace not in NOT_COMPUTE


def collectives(
    inside: Sequence[TraceEvent],
    gloo: Sequence[TraceEvent],
    during: Mapping[str, list[Interval]],
    groups: Mapping[str, tuple[str, tuple[int, ...]]],
) -> list[Transfer]:
    """The step's collectives in order of launch, each from its launch to the end of gloo's work.

    gloo's own spans name no process group; what launched them does, so the purpose is read there. Whatever the thread
    does until a launched collective ends, the wait for it among that, counts as the transfer.
    """
    launches = sorted((e for e in inside if str(e["name"]).startswith("c10d::")), key=lambda e: e["ts"])
    works = sorted((span(e) for e in gloo), key=lambda s: s[0])
    brackets = {
        kind: union(span(e) for e in inside if str(e["name"]).startswith(kind))
        for kind in ("FSDP::", "_c10d_functional::", EXPERT)
    }
    # FSDP names what it moves: a mixture's experts lie on other ranks than the rest.
    stacks = union(span(e) for e in inside if str(e["name"]).startswith("FSDP::") and ".experts" in str(e["name"]))
    by_axis = {description.removeprefix("mesh_"): ranks for description, ranks in groups.values()}
    found: list[Transfer] = []
    position = 0
    for launch in launches:
        start, end = span(launch)
        while position < len(works) and works[position][0] < start:
            position += 1
        if position < len(works):
            end = max(end, works[position][1])
            position += 1
        purpose = purpose_at(start, str(launch["name"]), during, brackets)
        # An axis that spans the world has no group of its own: it shares that of all ranks.
        axis = "expert_shard" if purpose == "shard" and within(start, stacks) else purpose
        ranks = by_axis.get(axis, by_axis.get("default_pg", ()))
        found.append(Transfer(purpose=purpose, ranks=ranks, index=0, start_s=start, end_s=end))
    return numbered(found)


def purpose_at(
    start: float, name: str, during: Mapping[str, list[Interval]], brackets: Mapping[str, list[Interval]]
) -> Purpose:
    """What a collective launched at `start` is for.

    FSDP gathers and reduces shards, and all-reduces replicas. Within the passes over the model all others are the
    tensor axis's: DTensor's, which are functional collectives, inside of FSDP's hooks too, and those of the loss.
    """
    if within(start, during["control"]):
        return "control"
    if within(start, brackets[EXPERT]):
        return "expert"
    if within(start, brackets["_c10d_functional::"]):
        return "tensor"
    if within(start, brackets["FSDP::"]):
        return "replica" if name.startswith("c10d::allreduce") else "shard"
    return "tensor" if within(start, during["forward"]) or within(start, during["backward"]) else "control"
