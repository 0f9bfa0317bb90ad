"""What only all ranks together can tell: which part of a collective was transfer, which was waiting, and for whom."""

from collections import Counter
from collections.abc import Sequence

import msgspec

from meshwright.account.step import MeasuredStep, StepAccount, Transfer

Group = tuple[int, ...]
Key = tuple[str, Group, int]


class ResolvedStep(msgspec.Struct, frozen=True, kw_only=True):
    """A measured step whose waits are separated from transfers and charged to the ranks that caused them.

    `blame`: seconds that this rank waited, by the rank it waited for.
    """

    step: int
    rank: int
    wall_s: float
    account: StepAccount
    overlapped: dict[str, float]
    blame: dict[int, float]


def split_waits(ranks: Sequence[MeasuredStep]) -> list[ResolvedStep]:
    """Separate transfer from waiting in one step, given as every rank measured it.

    A collective's transfer begins when its last participant starts; before that, the others wait for that one.
    Blame follows the chain: if the last to arrive had itself waited elsewhere since it last met these peers, that
    much of its lateness is charged to whom it waited for. With the replica and shard axes every rank has equal
    work, so all waiting is `straggler`.
    """
    offset = clock_offsets(ranks)
    meetings: dict[Key, dict[int, Transfer]] = {}
    for measured in ranks:
        for transfer in measured.transfers:
            meetings.setdefault(transfer.key, {})[measured.rank] = transfer

    def arrival(rank: int, transfer: Transfer) -> float:
        return transfer.start_s - offset[rank]

    waits: dict[int, list[tuple[int, float]]] = {measured.rank: [] for measured in ranks}
    moved: dict[int, Counter[str]] = {measured.rank: Counter() for measured in ranks}
    # How much of waits[rank] lies before the rank last met these peers.
    met: dict[tuple[int, Group], int] = {}
    order = sorted(meetings, key=lambda key: max(arrival(rank, t) for rank, t in meetings[key].items()))
    for key in order:
        arrivals = meetings[key]
        peers = key[1]
        last = max(arrivals, key=lambda rank: arrival(rank, arrivals[rank]))
        ready = arrival(last, arrivals[last])
        owed = waits[last][met.get((last, peers), 0) :]
        for rank, transfer in arrivals.items():
            wait = seconds_before(transfer.exposed, ready + offset[rank]) if rank != last else 0.0
            if wait > 0:
                moved[rank][transfer.purpose] += wait
                waits[rank] += charge(wait, owed, last)
        for rank in arrivals:
            met[(rank, peers)] = len(waits[rank])
    return [_resolved(measured, moved[measured.rank], waits[measured.rank]) for measured in ranks]


def charge(wait: float, owed: Sequence[tuple[int, float]], last: int) -> list[tuple[int, float]]:
    """Divide a wait for `last`: first over what it had itself waited for others, the rest is its own."""
    charged: list[tuple[int, float]] = []
    left = wait
    for culprit, seconds in owed:
        part = min(left, seconds)
        if part > 0:
            charged.append((culprit, part))
            left -= part
    if left > 0:
        charged.append((last, left))
    return charged


def seconds_before(intervals: Sequence[tuple[float, float]], until: float) -> float:
    """Seconds of `intervals` that lie before `until`."""
    return sum(max(0.0, min(end, until) - start) for start, end in intervals)


def clock_offsets(ranks: Sequence[MeasuredStep]) -> dict[int, float]:
    """Each rank's clock minus the first rank's, in seconds.

    Ranks of one host share a clock. A collective ends at about the same moment for all its participants, so the
    median difference of ends between two hosts is their clocks' offset, however far apart they are. A host that
    shares no collective with the others is taken as synchronised: its starts are compared with nobody's.
    """
    ends = {measured.rank: {t.key: t.end_s for t in measured.transfers} for measured in ranks}
    host_offset: dict[str, float] = {}
    for measured in ranks:
        if measured.host in host_offset:
            continue
        host_offset[measured.host] = 0.0
        for other in ranks:
            common = ends[other.rank].keys() & ends[measured.rank].keys()
            if common and other.host in host_offset and other.host != measured.host:
                differences = sorted(ends[measured.rank][key] - ends[other.rank][key] for key in common)
                host_offset[measured.host] = host_offset[other.host] + differences[len(differences) // 2]
                break
    return {measured.rank: host_offset[measured.host] for measured in ranks}


def _resolved(measured: MeasuredStep, moved: Counter[str], waits: Sequence[tuple[int, float]]) -> ResolvedStep:
    account = measured.account
    changes = {f"comm_{purpose}": getattr(account, f"comm_{purpose}") - seconds for purpose, seconds in moved.items()}
    changes["straggler"] = account.straggler + moved.total()
    blame: Counter[int] = Counter()
    for culprit, seconds in waits:
        blame[culprit] += seconds
    return ResolvedStep(
        step=measured.step,
        rank=measured.rank,
        wall_s=measured.wall_s,
        account=msgspec.structs.replace(account, **changes),
        overlapped=measured.overlapped,
        blame=dict(blame),
    )
