"""From what one rank did and waited for to its step account: every instant goes to exactly one bucket."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median

import msgspec

from meshwright.account import MeasuredStep, StepAccount, Transfer
from meshwright.account.intervals import Interval, clip, intersect, length, subtract


class Timeline(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's step before it is an account: when kernels ran, what it waited for, what was in flight.

    `waits` are disjoint from `busy`; `transfers` may overlap everything.
    """

    start_s: float
    end_s: float
    busy: Mapping[str, list[Interval]]
    waits: Mapping[str, list[Interval]]
    transfers: Sequence[Transfer]
    contention_s: float


def book(timeline: Timeline, *, step: int, rank: int, host: str, useful_s: float) -> MeasuredStep:
    """Turn a timeline into an account: busy first, then observed waits, then exposed transfers, then `other`."""
    window = [(timeline.start_s, timeline.end_s)]
    seconds: defaultdict[str, float] = defaultdict(float)
    left = window
    for kind, intervals in timeline.busy.items():
        seconds[kind] += length(intersect(left, intervals))
        left = subtract(left, intervals)
    busy = subtract(window, left)
    for kind, intervals in timeline.waits.items():
        seconds[kind] += length(intersect(left, intervals))
        left = subtract(left, intervals)
    exposed = expose(left, timeline.transfers)
    transfers: list[Transfer] = []
    overlapped: defaultdict[str, float] = defaultdict(float)
    for transfer, parts in zip(timeline.transfers, exposed, strict=True):
        seconds[f"comm_{transfer.purpose}"] += length(parts)
        overlapped[transfer.purpose] += length(clip(busy, transfer.start_s, transfer.end_s))
        transfers.append(msgspec.structs.replace(transfer, exposed=tuple(parts)))
    compute = seconds.pop("compute", 0.0)
    known = sum(seconds.values()) + compute
    account = StepAccount(
        useful=useful_s,
        contention=timeline.contention_s,
        # Negative where the kernels beat the datasheet.
        inefficiency=compute - useful_s - timeline.contention_s,
        other=timeline.end_s - timeline.start_s - known,
        **seconds,
    )
    return MeasuredStep(
        step=step,
        rank=rank,
        host=host,
        start_s=timeline.start_s,
        end_s=timeline.end_s,
        account=account,
        overlapped=dict(overlapped),
        transfers=tuple(transfers),
    )


def expose(idle: Sequence[Interval], transfers: Sequence[Transfer]) -> list[list[Interval]]:
    """The idle time that each transfer explains; an instant goes to one transfer only.

    What ends an idle stretch is the transfer that ends last within it, so that one has the first claim.
    """
    claims: list[list[Interval]] = [[] for _ in transfers]
    claimed = float("inf")
    for i in sorted(range(len(transfers)), key=lambda i: transfers[i].end_s, reverse=True):
        # All that have claimed ended later, so what they left over is what comes before the first of them.
        start, end = transfers[i].start_s, min(transfers[i].end_s, claimed)
        if start < end:
            claims[i] = clip(idle, start, end)
        claimed = min(claimed, start)
    return claims


def numbered(transfers: Sequence[Transfer]) -> list[Transfer]:
    """The same transfers with their index among those of the same purpose and ranks, in order of launch.

    Messages between stages have one: ranks do not wait for them in the order in which they are sent.
    """
    count: dict[tuple[str, tuple[int, ...]], int] = defaultdict(int)
    done: list[Transfer] = []
    for transfer in transfers:
        key = (transfer.purpose, transfer.ranks)
        own = transfer.purpose == "pipeline"
        done.append(transfer if own else msgspec.structs.replace(transfer, index=count[key]))
        count[key] += 1
    return done


def contention(durations: Mapping[str, list[tuple[float, bool]]]) -> float:
    """Seconds that kernels lost to transfers running beside them.

    A kernel's median time alone is the reference for the same kernel (name and launch shape) when overlapped; one
    that never ran alone has no reference and counts as not slowed.
    """
    lost = 0.0
    for samples in durations.values():
        alone = [seconds for seconds, overlapped in samples if not overlapped]
        if alone:
            reference = median(alone)
            lost += sum(seconds - reference for seconds, overlapped in samples if overlapped)
    return max(0.0, lost)
