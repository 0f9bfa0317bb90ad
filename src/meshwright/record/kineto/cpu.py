"""A CPU rank's step: the process is its own device.

Operators on the training thread are compute, a collective blocks it from its launch to its end, and Python between
operators is `host`.
"""

from collections.abc import Mapping, Sequence

from meshwright.account import Purpose, Transfer
from meshwright.account.intervals import Interval, intersect, subtract, union
from meshwright.record.kineto.events import TraceEvent, message_spans, phase_of, phases, span, within
from meshwright.record.timeline import Timeline, numbered

# Operator namespaces that are not work on data: the autograd engine's brackets, the collectives themselves, and our own
# operators, whose work is that of the operators inside.
NOT_COMPUTE = ("autograd", "c10d", "_c10d_functional", "meshwright", "profiler")


def cpu_timeline(
    events: Sequence[TraceEvent],
    groups: Mapping[str, tuple[str, tuple[int, ...]]],
    purposes: Mapping[str, Purpose],
) -> Timeline:
    """The last step of a CPU trace."""
    step, during = phases(events)
    thread = step["tid"]
    start, end = span(step)
    mine = [e for e in events if e.get("tid") == thread and e.get("cat") in ("cpu_op", "user_annotation")]
    inside = [e for e in mine if start <= span(e)[0] <= end]
    works = [e for e in events if str(e["name"]).startswith("gloo:") and not is_message(e)]
    transfers = [*collectives(inside, works, during, ranks_of(groups, purposes)), *messages(inside)]
    moving = union([(t.start_s, t.end_s) for t in transfers])
    # Attention's transfers run beside its operators, which are no wrapping around a wait.
    blocking = union([(t.start_s, t.end_s) for t in transfers if t.purpose != "context"])
    operators = subtract(union(span(e) for e in inside if is_compute(e)), blocking)
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


def is_message(event: TraceEvent) -> bool:
    """Whether an event is one rank's send to another, or the receiving of it."""
    return str(event["name"]) in ("c10d::send", "c10d::recv_", "gloo:send", "gloo:recv")


def messages(inside: Sequence[TraceEvent]) -> list[Transfer]:
    """What stages of a pipeline sent each other, as this rank waited for it: from where a pass needs it.

    Its source sends it and goes on; its target has posted a receive long before.
    """
    return [
        Transfer(
            purpose="pipeline",
            ranks=(message.source, message.target),
            index=message.number,
            start_s=message.interval[0],
            end_s=message.interval[1],
        )
        for message in message_spans(inside)
        if message.what != "receive"
    ]


def collectives(
    inside: Sequence[TraceEvent],
    gloo: Sequence[TraceEvent],
    during: Mapping[str, list[Interval]],
    ranks: Mapping[str, tuple[int, ...]],
) -> list[Transfer]:
    """The step's collectives in order of launch, each from its launch to the end of gloo's work.

    gloo's own spans name no process group; what launched them does, so the purpose is read there. Whatever the thread
    does until a launched collective ends, the wait for it among that, counts as the transfer, but for attention's
    operators beside transfers along context.
    """
    named = (e for e in inside if str(e["name"]).startswith("c10d::") and not is_message(e))
    launches = sorted(named, key=lambda e: e["ts"])
    works = sorted((span(e) for e in gloo), key=lambda s: s[0])
    brackets = {
        kind: union(span(e) for e in inside if str(e["name"]).startswith(kind))
        for kind in ("FSDP::", "_c10d_functional::")
    }
    # FSDP names what it moves: a mixture's experts lie on other ranks than the rest.
    stacks = union(span(e) for e in inside if str(e["name"]).startswith("FSDP::") and ".experts" in str(e["name"]))
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
        # An axis that spans the world has no group of its own: it shares that of all ranks, where control is.
        axis = "expert_shard" if purpose == "shard" and within(start, stacks) else purpose
        sharing = ranks.get(axis, ranks.get("control", ()))
        found.append(Transfer(purpose=purpose, ranks=sharing, index=0, start_s=start, end_s=end))
    return numbered(found)


def ranks_of(
    groups: Mapping[str, tuple[str, tuple[int, ...]]], purposes: Mapping[str, Purpose]
) -> dict[str, tuple[int, ...]]:
    """The ranks that share a purpose: those of its largest group, where several carry it; `control` has all.

    Those that a mixture's experts are split over stand apart, as `expert_shard`.
    """
    found: dict[str, tuple[int, ...]] = {}
    for description, ranks in groups.values():
        name = "expert_shard" if description == "mesh_expert_shard" else purposes.get(description, "control")
        found[name] = max(found.get(name, ()), ranks, key=len)
        if description == "default_pg":
            found["control"] = ranks
    return found


def purpose_at(
    start: float, name: str, during: Mapping[str, list[Interval]], brackets: Mapping[str, list[Interval]]
) -> Purpose:
    """What a collective launched at `start` is for.

    Attention and experts say themselves which are their own. FSDP gathers and reduces shards, and all-reduces replicas.
    Within the passes over the model all others are the tensor axis's: DTensor's, which are functional collectives,
    inside of FSDP's hooks too, and those of the loss.
    """
    if told := phase_of(start, during):
        return told
    if within(start, brackets["_c10d_functional::"]):
        return "tensor"
    if within(start, brackets["FSDP::"]):
        return "replica" if name.startswith("c10d::allreduce") else "shard"
    return "tensor" if within(start, during["forward"]) or within(start, during["backward"]) else "control"
