"""A CPU rank's step: the process is its own device.

Operators on the training thread are compute, a collective blocks it from its launch to its end, and Python between
operators is `host`.
"""

from collections.abc import Mapping, Sequence

import msgspec

from meshwright.account import Purpose, Transfer
from meshwright.account.intervals import Interval, intersect, length, subtract, union
from meshwright.record.kineto.marks import cpu_seconds, message_spans, span, within
from meshwright.record.kineto.phases import Phases
from meshwright.record.kineto.purposes import Sent, kind_of, purposes_of, told_by_phase
from meshwright.record.kineto.steps import HostStep, Slice
from meshwright.record.kineto.trace import Event
from meshwright.record.kineto.walk import Walk
from meshwright.record.timeline import Timeline, numbered

# Operator namespaces that are not work on data: the autograd engine's brackets, the collectives themselves, and our own
# operators, whose work is that of the operators inside.
NOT_COMPUTE = ("autograd", "c10d", "_c10d_functional", "meshwright", "profiler")
# One rank's send to another, or the receiving of it.
MESSAGES = ("c10d::send", "c10d::recv_", "gloo:send", "gloo:recv")

Groups = Mapping[str, tuple[str, tuple[int, ...]]]


class CpuStep(msgspec.Struct, frozen=True, kw_only=True):
    """A step's timeline, and what its detail is made of: the operators at work on data, and the collectives."""

    timeline: Timeline
    operators: list[Event]
    sent: list[Sent]


def cpu_step(
    step: HostStep, events: Slice, walk: Walk, phases: Phases, groups: Groups, named: Mapping[str, Purpose]
) -> CpuStep:
    """What one step computed, sent and waited for."""
    start, end = step.begin_s, step.end_s
    during = phases.during
    inside = [e for e in events.operators.get(step.thread, ()) if e.start_s <= end]
    works = [e for own in (events.marks, *events.operators.values()) for e in own if e.name.startswith("gloo:")]
    sent, held = collectives(inside, [e for e in works if e.name not in MESSAGES], phases, walk)
    purposes: list[Purpose] = purposes_of(sent, phases, walk, named)
    if phases.told:
        purposes = [purpose_at(one, phases, walk) for one in sent]
    transfers = [*shared(sent, purposes, phases, groups, named), *messages(events)]
    # Attention's transfers, and those of gradients beside a backward pass, run beside operators that are no wrapping
    # around a wait.
    blocking = union(span for span, purpose in zip(held, purposes, strict=True) if purpose != "context")
    blocking = union([*blocking, *((t.start_s, t.end_s) for t in transfers if t.purpose == "pipeline")])
    at_work = [e for e in inside if is_compute(e)]
    operators = subtract(union(span(e) for e in at_work), blocking)
    waiting = {name: during[name] for name in ("input", "checkpoint")}
    working = subtract(operators, union([*waiting["input"], *waiting["checkpoint"]]))
    updating, again = intersect(working, during["optimizer"]), intersect(working, during["recompute"])
    told = union([i for name in ("forward", "backward", "optimizer", "control") for i in during[name]])
    python = told if phases.told else [(start, end)]
    moving = union([(t.start_s, t.end_s) for t in transfers])
    on_core_s = cpu_seconds(events.marks)
    computing = subtract(working, union([*updating, *again]))
    timeline = Timeline(
        start_s=start,
        end_s=end,
        busy={"optimizer": updating, "recompute": again, "compute": computing},
        waits={**waiting, "host": subtract(subtract(python, working), moving)},
        transfers=transfers,
        # More than the thread was on a core at all, operators cannot have worked.
        contention_s=0.0 if on_core_s is None else min(length(computing), max(0.0, length(working) - on_core_s)),
    )
    return CpuStep(timeline=timeline, operators=at_work, sent=sent)


def is_compute(event: Event) -> bool:
    """Whether an operator is at work on data."""
    namespace, separator, _ = event.name.partition("::")
    return bool(separator) and namespace not in NOT_COMPUTE


def messages(events: Slice) -> list[Transfer]:
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
        for message in message_spans(events.marks)
        if message.what != "receive"
    ]


def collectives(
    inside: Sequence[Event], works: Sequence[Event], phases: Phases, walk: Walk
) -> tuple[list[Sent], list[Interval]]:
    """The step's collectives in order of launch, each from its launch to the end of gloo's work, and when they block.

    gloo's own spans name no process group. Whatever the thread does until a launched collective ends, the wait for it
    among that, counts as the transfer, but beside DistributedDataParallel's, which go on while the backward pass does.
    Messages between stages of other programs are taken as they are launched and waited for.
    """
    own = phases.told
    launches = [e for e in inside if e.name.startswith("c10d::") and not (own and e.name in MESSAGES)]
    ends = sorted((span(e) for e in works), key=lambda s: s[0])
    found: list[Sent] = []
    held: list[Interval] = []
    position = 0
    for launch in launches:
        start, end = span(launch)
        while position < len(ends) and ends[position][0] < start:
            position += 1
        if position < len(ends) and launch.name not in MESSAGES:
            end = max(end, ends[position][1])
            position += 1
        found.append(Sent(kind=kind_of(launch.name.removeprefix("c10d::")), launch_s=start, start_s=start, end_s=end))
        beside = not own and within(start, walk.accumulating)
        held.append((start, launch.end_s) if beside else (start, end))
    return found, held


def shared(
    sent: Sequence[Sent],
    purposes: Sequence[Purpose],
    phases: Phases,
    groups: Groups,
    named: Mapping[str, Purpose],
) -> list[Transfer]:
    """The collectives, each with the ranks that share its purpose."""
    ranks = ranks_of(groups, named)
    found: list[Transfer] = []
    for one, purpose in zip(sent, purposes, strict=True):
        # An axis that spans the world has no group of its own: it shares that of all ranks, where control is.
        axis = "expert_shard" if purpose == "shard" and within(one.launch_s, phases.stacks) else purpose
        sharing = ranks.get(axis, ranks.get("control", ()))
        found.append(Transfer(purpose=purpose, ranks=sharing, index=0, start_s=one.start_s, end_s=one.end_s))
    return numbered(found)


def ranks_of(groups: Groups, named: Mapping[str, Purpose]) -> dict[str, tuple[int, ...]]:
    """The ranks that share a purpose: those of its largest group, where several carry it; `control` has all.

    Those that a mixture's experts are split over stand apart, as `expert_shard`.
    """
    found: dict[str, tuple[int, ...]] = {}
    for description, ranks in groups.values():
        name = "expert_shard" if description == "mesh_expert_shard" else named.get(description, "control")
        found[name] = max(found.get(name, ()), ranks, key=len)
        if description == "default_pg":
            found["control"] = ranks
    return found


def purpose_at(one: Sent, phases: Phases, walk: Walk) -> Purpose:
    """What a collective of our own trainer is for.

    Attention and experts say themselves which are their own. FSDP gathers and reduces shards, and all-reduces replicas.
    Within the passes over the model all others are the tensor axis's: DTensor's, which are functional collectives,
    inside of FSDP's hooks too, and those of the loss.
    """
    at, during = one.launch_s, phases.during
    if told := told_by_phase(at, phases):
        return told
    if within(at, walk.functional):
        return "tensor"
    if within(at, phases.sharding):
        return "replica" if one.kind == "all_reduce" else "shard"
    return "tensor" if within(at, during["forward"]) or within(at, during["backward"]) else "control"
