"""What each collective of a step was for, by what launched it, what its group is called, and what it carried.

A process group may carry several purposes, so that it is asked last.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

import msgspec

from meshwright.account import Purpose
from meshwright.record.kineto.marks import within
from meshwright.record.kineto.phases import Phases
from meshwright.record.kineto.walk import Walk

# Phases of a program that say themselves what a collective launched in them is for.
TELLING: tuple[Purpose, ...] = ("control", "context", "expert")
# A few numbers: a norm, a count, a loss.
TINY_BYTES = 256
# Outside of the passes over the model, all that is smaller than this is a small sync: norms of many tensors at most.
SMALL_BYTES = 64 * 1024

# Names of collectives, less underscores, and the kind each is of. The first that a name holds is taken.
KINDS = {
    "alltoall": "all_to_all",
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "reducescatter": "reduce_scatter",
    "broadcast": "broadcast",
    "barrier": "barrier",
    "sendrecv": "",
    "send": "send",
    "recv": "recv",
    "gather": "gather",
    "scatter": "scatter",
    "reduce": "reduce",
}
MESSAGES = ("send", "recv")

# Words of groups' descriptions in torchtitan, Megatron, DeepSpeed, accelerate and our own layouts; the first that
# matches a description is taken, as several stand in one ("dp_shard_cp", EXPERT_DATA_PARALLEL_GROUP).
DATA = frozenset({"dp", "data"})
WORDS: tuple[tuple[frozenset[str], Purpose], ...] = (
    (frozenset({"shard", "fsdp", "efsdp", "zero"}), "shard"),
    (frozenset({"replicate", "replica", "ddp"}), "replica"),
    (DATA, "replica"),
    (frozenset({"pp", "pipeline", "pipe", "stage", "embedding"}), "pipeline"),
    (frozenset({"ep", "expert", "experts", "moe"}), "expert"),
    (frozenset({"cp", "context", "sp", "sequence", "ulysses", "ring"}), "context"),
    (frozenset({"tp", "etp", "tensor", "mp"}), "tensor"),
)
# What ranks that differ in data alone move.
BY_KIND: dict[str, Purpose] = {"all_reduce": "replica", "all_gather": "shard", "reduce_scatter": "shard"}
# Of Megatron: what holds for all ranks of a replica together.
ACROSS = re.compile(r"^(tensor_and_data|model_parallel|tensor_model_and)", re.IGNORECASE)


class Sent(msgspec.Struct, frozen=True, kw_only=True):
    """A collective, or a message between two ranks, before it is known what it is for.

    launch_s: when the host launched it. group, description: of its process group, "" where the trace does not say.
    sent_bytes: of this rank's input. ends, number: of a message between stages, where the trace names them: source and
    target, and which of theirs it is.
    """

    kind: str
    launch_s: float
    start_s: float
    end_s: float
    group: str = ""
    description: str = ""
    ranks: tuple[int, ...] = ()
    sent_bytes: float | None = None
    ends: tuple[int, int] | None = None
    number: int | None = None


def kind_of(name: str) -> str:
    """What kind of collective a name is of; "" where it does not tell."""
    plain = name.lower().replace("_", "")
    return next((kind for word, kind in KINDS.items() if word in plain), "")


def described(description: str, kind: str) -> Purpose | None:
    """What a group's description says it is for."""
    if ACROSS.match(description):
        return "control"
    words = set(re.split(r"[^a-z0-9]+", description.lower()))
    for known, purpose in WORDS:
        if words & known:
            return BY_KIND.get(kind, "control") if known is DATA else purpose
    return None


def purposes_of(sent: Sequence[Sent], phases: Phases, walk: Walk, named: Mapping[str, Purpose]) -> list[Purpose]:
    """What each collective of a step was for.

    named: purposes of process groups that somebody knows, by description or by name.
    """
    known: list[Purpose | None] = [told_purpose(one, phases, walk, named) for one in sent]
    # What is left over goes by what its group carries in this step besides.
    kinds: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for one, purpose in zip(sent, known, strict=True):
        if purpose is None:
            kinds[one.group].add((one.kind, pass_of(one, phases)))
    found: list[Purpose] = []
    for one, purpose in zip(sent, known, strict=True):
        found.append(carried(one, kinds[one.group], phases) if purpose is None else purpose)
    return found


def told_purpose(one: Sent, phases: Phases, walk: Walk, named: Mapping[str, Purpose]) -> Purpose | None:
    """What a collective was for, by what launched it or by its group's name; None where neither tells."""
    at = one.launch_s
    if one.ends is not None:
        return "pipeline"
    if told := told_by_phase(at, phases):
        return told
    if told := named.get(one.description) or named.get(one.group):
        return told
    word = described(one.description, one.kind)
    if one.kind in MESSAGES:
        return word if word in ("context", "expert") else "pipeline"
    functional = within(at, walk.functional)
    if not functional and within(at, phases.sharding):
        return "replica" if one.kind == "all_reduce" else "shard"
    if not functional and one.kind == "all_reduce" and within(at, walk.accumulating):
        return "replica"
    if is_small(one, phases):
        return "control"
    return word or ("tensor" if functional else None)


def told_by_phase(moment: float, phases: Phases) -> Purpose | None:
    """What a collective launched at this moment is for whatever else its group carries, if its phase says so."""
    return next((purpose for purpose in TELLING if within(moment, phases.during[purpose])), None)


def is_small(one: Sent, phases: Phases) -> bool:
    """Whether a collective is a small sync: a few numbers, or outside of the passes, where sizes are not known too."""
    if one.kind in ("barrier", "broadcast", "gather", "scatter", "reduce"):
        return True
    if one.sent_bytes is not None and one.sent_bytes <= TINY_BYTES:
        return True
    return within(one.launch_s, phases.outside) and (one.sent_bytes or 0.0) <= SMALL_BYTES


def pass_of(one: Sent, phases: Phases) -> str:
    """Where a collective was launched: forward, backward or outside of both."""
    if within(one.launch_s, phases.outside):
        return "outside"
    return "backward" if within(one.launch_s, phases.during["backward"]) else "forward"


def carried(one: Sent, kinds: set[tuple[str, str]], phases: Phases) -> Purpose:
    """What a collective was for, by its kind and what else its group carried: the kinds, and in which pass."""
    if one.kind == "all_to_all":
        return "expert"
    if one.kind == "all_reduce":
        # Sums of partial results are made in both passes, those of gradients when there are gradients.
        return "tensor" if ("all_reduce", "forward") in kinds and pass_of(one, phases) != "outside" else "replica"
    if one.kind not in ("all_gather", "reduce_scatter"):
        return "control"
    scattered = {place for kind, place in kinds if kind == "reduce_scatter"}
    if "forward" in scattered:
        # Parameters have no gradients there: what is split is the sequence.
        return "tensor"
    # Without gradients that are scattered, and no size told, values are gathered to be looked at.
    return "shard" if scattered or (one.sent_bytes or 0.0) > SMALL_BYTES else "control"
