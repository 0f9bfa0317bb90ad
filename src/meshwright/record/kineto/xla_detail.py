"""What a step of an XLA trace tells beyond its account: collectives that have a purpose, and idle stretches."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from meshwright.account import Purpose, Transfer
from meshwright.account.intervals import Interval, intersect, length, subtract
from meshwright.record.detail import Gap, GroupTransfers
from meshwright.record.kineto.trace import Event
from meshwright.record.kineto.xla_ops import Op
from meshwright.record.timeline import expose

# Gaps that a step's detail lists.
LISTED_GAPS = 10
# What the host did for less than this share of a gap is not what it did.
MOST_OF_IT = 0.5


def transfer_groups(transfers: Sequence[Transfer], busy: Sequence[Interval], window: Interval) -> list[GroupTransfers]:
    """Collectives that have a purpose, by it. A trace names no groups."""
    idle = subtract([window], busy)
    exposed: dict[Purpose, float] = defaultdict(float)
    overlapped: dict[Purpose, float] = defaultdict(float)
    count: dict[Purpose, int] = defaultdict(int)
    for transfer, parts in zip(transfers, expose(idle, transfers), strict=True):
        exposed[transfer.purpose] += length(parts)
        overlapped[transfer.purpose] += length(intersect(busy, [(transfer.start_s, transfer.end_s)]))
        count[transfer.purpose] += 1
    return [
        GroupTransfers(
            group="",
            ranks=(),
            purpose=purpose,
            count=count[purpose],
            sent_bytes=None,
            exposed_s=exposed[purpose],
            overlapped_s=overlapped[purpose],
        )
        for purpose in count
    ]


def longest_gaps(
    idle: Mapping[str, Sequence[Interval]], ops: Sequence[Op], host: Sequence[Event], begin_s: float
) -> list[Gap]:
    """The longest stretches in which no instruction ran, by their buckets; begin_s: of the step."""
    stretches = [(stretch, bucket) for bucket, found in idle.items() for stretch in found]
    longest = sorted(stretches, key=lambda one: one[0][0] - one[0][1])[:LISTED_GAPS]
    return [
        Gap(
            start_s=start - begin_s,
            seconds=end - start,
            bucket=bucket,
            doing=doing_in((start, end), host),
            before=next((op.kernel for op in ops if op.start_s >= end), ""),
        )
        for (start, end), bucket in longest
    ]


def doing_in(gap: Interval, host: Sequence[Event]) -> str:
    """The innermost thing that the host did for the most of a gap; "" where the trace does not say."""
    start, end = gap
    least = MOST_OF_IT * (end - start)
    during = [e for e in host if min(e.end_s, end) - max(e.start_s, start) > least]
    # JAX marks frames of Python by a dollar sign.
    return min(during, key=lambda e: e.end_s - e.start_s).name.removeprefix("$") if during else ""


def untold_note(untold: Mapping[str, float], whole_s: float) -> str:
    """A sentence about exposed collectives whose purpose nobody gave. whole_s: all steps of all devices."""
    kinds = sorted(untold, key=lambda kind: -untold[kind])
    shares = ", ".join(f"{kind} {untold[kind] / whole_s:.1%}" for kind in kinds)
    return (
        f"Of the steps' time {sum(untold.values()) / whole_s:.1%} is exposed collectives, which stand in `unseen` "
        f"({shares}): XLA's names do not say what a collective is for."
    )
