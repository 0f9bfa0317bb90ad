"""What only all ranks together can tell: which part of a collective was transfer, which was waiting, and for whom."""

from collections.abc import Collection, Mapping, Sequence
from statistics import median

import msgspec

from meshwright.account.step import MeasuredStep, Purpose, StepAccount, Transfer
from meshwright.account.uneven import uneven_seconds

Group = tuple[int, ...]
Key = tuple[str, Group, int]
# Seconds by the rank that caused them.
Seconds = dict[int, float]
# Less than this is the rounding of clocks and sums, and nobody's fault.
TICK_S = 1e-9


class ResolvedStep(msgspec.Struct, frozen=True, kw_only=True):
    """A measured step whose waits are separated from transfers and charged to the ranks that caused them.

    `waited`: seconds by the purpose of the transfers waited at. `blame`: by the rank waited for, where that is known,
    other than for what that rank had more to do.
    """

    step: int
    rank: int
    wall_s: float
    account: StepAccount
    overlapped: dict[str, float]
    waited: dict[str, float]
    blame: dict[int, float]


def split_waits(ranks: Sequence[MeasuredStep], unblamed: Collection[Purpose] = ()) -> list[ResolvedStep]:
    """Separate transfer from waiting in one step, given as every rank measured it.

    A collective's transfer begins when its last participant starts; before that, the others wait for that one.
    Blame follows the chain: what the last to arrive had itself been delayed by others is charged to those others.
    Waiting for a rank that was given more by the routing of a mixture is `imbalance`; all other is `straggler`, as
    all is between ranks of equal work.

    unblamed: purposes at which ranks have to wait at equal work too, so that waiting shows nothing of anybody's delay.
    """
    offset = clock_offsets(ranks)
    meetings: dict[Key, dict[int, Transfer]] = {}
    for measured in ranks:
        for transfer in measured.transfers:
            meetings.setdefault(transfer.key, {})[measured.rank] = transfer
    arrivals = {key: {r: t.start_s - offset[r] for r, t in met.items()} for key, met in meetings.items()}

    # How much later than an undisturbed step each rank runs, by the rank that caused it.
    delay: dict[int, Seconds] = {measured.rank: {} for measured in ranks}
    moved: dict[int, dict[str, float]] = {measured.rank: {} for measured in ranks}
    blame: dict[int, Seconds] = {measured.rank: {} for measured in ranks}
    uneven: dict[int, float] = dict.fromkeys(offset, 0.0)
    by_rank = {measured.rank: measured for measured in ranks}
    for key in sorted(arrivals, key=lambda key: max(arrivals[key].values())):
        arrived = arrivals[key]
        last = max(arrived, key=lambda rank: arrived[rank])
        ready = arrived[last]
        # At equal work all would have arrived together: what the last one's known delay does not explain is its own.
        lateness = max(sum(delay[rank].values()) + ready - arrived[rank] for rank in arrived)
        if key[0] not in unblamed:
            add(delay[last], last, lateness - sum(delay[last].values()))
        for rank, transfer in meetings[key].items():
            wait = min(seconds_before(transfer.exposed, ready + offset[rank]), ready - arrived[rank])
            if wait > TICK_S:
                moved[rank][transfer.purpose] = moved[rank].get(transfer.purpose, 0.0) + wait
            if wait > TICK_S and transfer.purpose not in unblamed:
                for culprit, seconds in charge(wait, last, rank, delay).items():
                    add(blame[rank], culprit, seconds)
                # The rank goes on when the last one lets it: it is now late for the last one's reasons.
                total = sum(delay[rank].values()) + wait
                delay[rank] = {culprit: s * total / lateness for culprit, s in delay[last].items()}
    for rank, seconds in blame.items():
        for culprit, waited in seconds.items():
            explained = min(waited, uneven_seconds(by_rank[rank], by_rank[culprit]))
            uneven[rank] += explained
            seconds[culprit] = waited - explained
    begun = {key: max(arrived.values()) for key, arrived in arrivals.items()}
    return [
        msgspec.structs.replace(
            _resolved(m, moved[m.rank], uneven[m.rank], blame[m.rank]), overlapped=hidden_of(m, begun, offset[m.rank])
        )
        for m in ranks
    ]


def hidden_of(measured: MeasuredStep, begun: Mapping[Key, float], offset: float) -> dict[str, float]:
    """Transfer that ran beside kernels: of messages between stages only what follows their sending.

    A receive is posted long before, and on a GPU its kernel waits beside all others. What it is beside is not kept
    moment by moment, so idle time that something else explains may be left in it, for as long as the message moves.
    """
    hidden = dict(measured.overlapped)
    if "pipeline" in hidden:
        moving = 0.0
        for transfer in measured.transfers:
            if transfer.purpose == "pipeline":
                begin = max(transfer.start_s, begun[transfer.key] + offset)
                exposed = transfer.exposed_s() - seconds_before(transfer.exposed, begin)
                moving += max(0.0, transfer.end_s - begin - exposed)
        hidden["pipeline"] = min(hidden["pipeline"], moving)
    return hidden


def charge(wait: float, last: int, waiting: int, delay: Mapping[int, Seconds]) -> Seconds:
    """Divide a wait for `last` over the causes of its delay that had not delayed the waiting rank before."""
    known = delay[waiting]
    news = {c: seconds - known.get(c, 0.0) for c, seconds in delay[last].items() if c != waiting}
    news = {c: seconds for c, seconds in news.items() if seconds > TICK_S} or {last: wait}
    total = sum(news.values())
    return {c: wait * seconds / total for c, seconds in news.items()}


def add(seconds: Seconds, rank: int, more: float) -> None:
    """Add to one rank's entry, unless it is nothing."""
    if more > TICK_S:
        seconds[rank] = seconds.get(rank, 0.0) + more


def seconds_before(intervals: Sequence[tuple[float, float]], until: float) -> float:
    """Seconds of `intervals` that lie before `until`."""
    return sum(max(0.0, min(end, until) - start) for start, end in intervals)


def clock_offsets(ranks: Sequence[MeasuredStep]) -> dict[int, float]:
    """Each rank's clock minus the first rank's, in seconds.

    Ranks of one host share a clock. A collective ends at about the same moment for all its participants, so the
    median difference of ends between two hosts is their clocks' offset, however far apart they are. A host that
    shares no collective with the others, directly or through a third, is taken as synchronised: its starts are
    compared with nobody's.
    """
    ends: dict[str, dict[Key, float]] = {}
    for measured in ranks:
        ends.setdefault(measured.host, {}).update({t.key: t.end_s for t in measured.transfers})
    offset: dict[str, float] = {}
    for host in ends:
        offset.setdefault(host, 0.0)
        reached = [host]
        for known in reached:
            for other in ends.keys() - offset.keys():
                if common := ends[other].keys() & ends[known].keys():
                    offset[other] = offset[known] + median(ends[other][key] - ends[known][key] for key in common)
                    reached.append(other)
    return {measured.rank: offset[measured.host] for measured in ranks}


def _resolved(measured: MeasuredStep, moved: dict[str, float], uneven: float, blame: Seconds) -> ResolvedStep:
    account = measured.account
    changes = {f"comm_{purpose}": getattr(account, f"comm_{purpose}") - seconds for purpose, seconds in moved.items()}
    changes["straggler"] = account.straggler + sum(moved.values()) - uneven
    changes["imbalance"] = account.imbalance + uneven
    return ResolvedStep(
        step=measured.step,
        rank=measured.rank,
        wall_s=measured.wall_s,
        account=msgspec.structs.replace(account, **changes),
        overlapped=measured.overlapped,
        waited=moved,
        blame={culprit: seconds for culprit, seconds in blame.items() if seconds > TICK_S},
    )
