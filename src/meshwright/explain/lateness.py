"""What made each rank lose time in a step, itself and by waiting: every second is charged once, where it arose."""

import re
from collections.abc import Mapping, Sequence

import msgspec

from meshwright.account import StepAccount
from meshwright.account.waits import TICK_S
from meshwright.explain.steps import RankStep

# By rank.
Seconds = dict[int, float]

# A rank that is late by one of these is no slow rank: the cause is named, and its cure is another one. Contention is
# one on CPUs, where it is time that the rank's thread was not on a core; on GPUs it is part of compute.
NAMED = ("input", "checkpoint", "synchronize", "collect", "memory", "contention")
# Time lost on the host beside them. On one rank alone it makes that rank a slow one.
ON_HOST = ("launch", "python", "host")
# All that a rank may merely take longer for than its peers.
SLOWER = ("compute", "recompute", "optimizer", *ON_HOST, "transfers", "other")
FAULTS = (*NAMED, *ON_HOST, "other", "straggler")

# The allocator at the driver's door: the step waits until the device's memory is given or taken back.
ALLOCATION = re.compile(r"\b((cuda|hip)(Malloc|Free)(Async)?|cuMem(Create|Map|Unmap|Release|SetAccess))\b")


class Losses(msgspec.Struct, frozen=True, kw_only=True):
    """One step. own[cause][rank]: seconds that the rank itself lost. waited[cause][rank]: seconds that it waited for
    ranks which that cause made late. longer[rank][part]: why a slow rank is slow; what no part explains is in "".
    kept: seconds of each rank's step but for its waits, and for what a peer was given more to do.
    """

    own: dict[str, Seconds]
    waited: dict[str, Seconds]
    longer: dict[int, dict[str, float]]
    kept: Seconds

    def gain(self, cause: str) -> float:
        """Seconds that the step would be shorter without a cause, at most: were no other in its way."""
        own, waited = self.own[cause], self.waited.get(cause, {})
        if cause == "straggler":
            # Ranks that are late in turn are so by chance: without it all would go at their mean pace, not at that of
            # each moment's fastest. What a rank waited, and what it was late by itself, are two views of that.
            return max(self.gain_of(own, {}, fault=True), *waited.values(), 0.0)
        return self.gain_of(own, waited, fault=True)

    def gain_of(self, own: Mapping[int, float], waited: Mapping[int, float], *, fault: bool) -> float:
        """The same of any seconds of each rank; fault: they are among the causes.

        A rank that would be done before others even with its loss gains nothing: the step is as long as its slowest
        rank. What it waited for others' losses is gained with them.
        """
        rest = {
            rank: seconds - sum(self.own[name].get(rank, 0.0) for name in FAULTS) - (0.0 if fault else own[rank])
            for rank, seconds in self.kept.items()
        }
        most = max(rest.values())
        return max(max(0.0, own.get(rank, 0.0) - (most - rest[rank])) + waited.get(rank, 0.0) for rank in rest)


def losses_of(ranks: Sequence[RankStep], kind: str = "", *, alike: bool = False) -> Losses:
    """Charge one step's waits to what made the ranks late that were waited for.

    A rank is late by what it lost more of than the rank that waited longest for it: first by the named causes; what
    they leave makes it a slow rank. kind: of device, as in Program. alike: all ranks run one program, in which their
    waits cannot be told from the rest of it.
    """
    parts = {one.resolved.rank: parts_of(one, kind) for one in ranks}
    hidden = {one.resolved.rank: sum(one.resolved.overlapped.values()) for one in ranks}
    alone = {one.resolved.rank: uncovered(one, parts, hidden) for one in ranks}
    own = {cause: {rank: parts[rank].get(cause, 0.0) for rank in parts} for cause in FAULTS}
    waited: dict[str, Seconds] = {}
    longer: dict[int, dict[str, float]] = {}
    for culprit in parts:
        waits = {
            one.resolved.rank: one.resolved.blame.get(culprit, 0.0) + alone[one.resolved.rank].get(culprit, 0.0)
            for one in ranks
        }
        longest = max(waits, key=lambda rank: waits[rank])
        if waits[longest] <= TICK_S:
            continue
        more = {part: max(0.0, parts[culprit][part] - parts[longest][part]) for part in parts[culprit]}
        late = {cause: more[cause] for cause in NAMED if more[cause] > TICK_S}
        late["straggler"] = max(0.0, waits[longest] - sum(late.values()))
        whole = sum(late.values())
        for rank, wait in waits.items():
            for cause, seconds in late.items():
                charged = waited.setdefault(cause, {})
                charged[rank] = charged.get(rank, 0.0) + wait * seconds / whole
        longer[culprit] = why_slower({part: more[part] for part in SLOWER}, late["straggler"])
        own["straggler"][culprit] = late["straggler"]
        for part in (*ON_HOST, "other"):
            # Already charged to the rank as a slow one.
            own[part][culprit] -= longer[culprit].get(part, 0.0)
    accounts = {one.resolved.rank: one.resolved.account for one in ranks}
    kept = {one.resolved.rank: one.resolved.wall_s for one in ranks}
    for rank, account in accounts.items():
        kept[rank] -= account.straggler + account.imbalance + sum(alone[rank].values())
    if alike:
        # What one of them was longer in it than the one that was in it shortest, it waited for others.
        inside = {rank: account.unseen + moving(account) for rank, account in accounts.items()}
        kept = {rank: seconds - (inside[rank] - min(inside.values())) for rank, seconds in kept.items()}
    return Losses(own=own, waited=waited, longer=longer, kept=kept)


def uncovered(one: RankStep, parts: Mapping[int, Mapping[str, float]], hidden: Seconds) -> Seconds:
    """Transfers that are exposed on this rank only because it is done before the rank that it waits for most.

    On that rank they run beside kernels, so that the step is no longer for them; were it in time, they would run beside
    this rank's kernels too. By that rank; no more than hides there, and than it is slower beyond the waits.
    hidden: transfers beside each rank's kernels.
    """
    waits = one.resolved.blame
    culprit = max(waits, key=lambda rank: waits[rank], default=None)
    if culprit is None or culprit not in parts:
        return {}
    own, late = parts[one.resolved.rank], parts[culprit]
    slower = sum(max(0.0, late[part] - own[part]) for part in (*NAMED, *SLOWER) if part != "transfers")
    more = own["transfers"] - late["transfers"]
    return {culprit: max(0.0, min(more, hidden[culprit], slower - waits[culprit]))}


def why_slower(more: Mapping[str, float], late_s: float) -> dict[str, float]:
    """A slow rank's lateness over the parts of its step that took longer than elsewhere, in proportion."""
    total = sum(more.values())
    explained = min(late_s, total)
    found = {part: seconds * explained / total for part, seconds in more.items() if seconds > TICK_S and explained > 0}
    return {**found, "": late_s - explained}


def moving(account: StepAccount) -> float:
    """Seconds of exposed transfers."""
    return sum(seconds for name, seconds in account.rows() if name.startswith("comm."))


def parts_of(one: RankStep, kind: str) -> dict[str, float]:
    """A rank's step by what it did and lost, waits left out; what the host did where the record says it."""
    account = one.resolved.account
    host: dict[str, float] = {**one.detail.host} if one.detail is not None else {}
    told = sum(host.values())
    gaps = one.detail.gaps if one.detail is not None else ()
    allocating = sum(gap.seconds for gap in gaps if gap.bucket == "host" and ALLOCATION.search(gap.doing))
    memory = 0.0
    for cause in ("launch", "synchronize", "python"):
        taken = min(host.get(cause, 0.0), allocating - memory)
        host[cause] = host.get(cause, 0.0) - taken
        memory += taken
    contention = account.contention if kind == "cpu" else 0.0
    return {
        "input": account.input,
        "checkpoint": account.checkpoint,
        "synchronize": host["synchronize"],
        "collect": host.get("collect", 0.0),
        "memory": memory,
        "launch": host["launch"],
        "python": host["python"],
        "host": max(0.0, account.host - told),
        "contention": contention,
        "compute": account.compute - contention,
        "recompute": account.recompute,
        "optimizer": account.optimizer,
        "transfers": moving(account),
        "other": account.other,
    }
