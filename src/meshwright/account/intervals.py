"""Arithmetic on stretches of time: sorted, disjoint (start, end) pairs in seconds."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Any intervals, in any order, as sorted disjoint ones."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if end <= start:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def intersect(one: Sequence[Interval], two: Sequence[Interval]) -> list[Interval]:
    """The time that lies in both; each sorted and disjoint."""
    found: list[Interval] = []
    i = j = 0
    while i < len(one) and j < len(two):
        start, end = max(one[i][0], two[j][0]), min(one[i][1], two[j][1])
        if start < end:
            found.append((start, end))
        if one[i][1] <= two[j][1]:
            i += 1
        else:
            j += 1
    return found


def subtract(one: Sequence[Interval], two: Sequence[Interval]) -> list[Interval]:
    """The time of `one` that does not lie in `two`; each sorted and disjoint."""
    left: list[Interval] = []
    j = 0
    for start, end in one:
        while j < len(two) and two[j][1] <= start:
            j += 1
        k = j
        while k < len(two) and two[k][0] < end:
            if two[k][0] > start:
                left.append((start, two[k][0]))
            start = max(start, two[k][1])
            k += 1
        if start < end:
            left.append((start, end))
    return left


def clip(intervals: Sequence[Interval], start: float, end: float) -> list[Interval]:
    """The parts of sorted, disjoint intervals that lie between two moments, found without a look at the others."""
    first = max(0, bisect_right(intervals, (start, start)) - 1)
    behind = bisect_left(intervals, (end, end), first)
    return [(max(s, start), min(e, end)) for s, e in intervals[first:behind] if s < end and e > start]


def length(intervals: Iterable[Interval]) -> float:
    """Seconds in all."""
    return sum(end - start for start, end in intervals)
