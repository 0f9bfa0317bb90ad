"""Which source each sample comes from: its share to each, spread as evenly as whole samples allow, and computed."""

import math
from collections.abc import Sequence
from typing import NamedTuple

# Weights become whole numbers that add up to about this, so that counting with them is exact.
SHARES = 1 << 20


class Turn(NamedTuple):
    """Whose turn a sample number is, and how many samples that source gave before."""

    source: int
    number: int


def whole_shares(weights: Sequence[float]) -> list[int]:
    """Weights as whole numbers in their proportion, at least 1 each."""
    total = math.fsum(weights)
    return [max(1, round(weight / total * SHARES)) for weight in weights]


def count_before(number: int, shares: Sequence[int]) -> list[int]:
    """How many of the samples 0 to `number` - 1 come from each source.

    The first source has its share of them, rounded down; the second has its share among the others of what is left;
    and so on. The last has the rest. So each count grows by one or not at all when `number` does, and the counts add
    up to it.
    """
    counts: list[int] = []
    left, others = number, sum(shares)
    for share in shares:
        counts.append(left * share // others)
        left, others = left - counts[-1], others - share
    return counts


def turn_of(number: int, shares: Sequence[int]) -> Turn:
    """The source of sample `number` and the sample's number there."""
    before, after = count_before(number, shares), count_before(number + 1, shares)
    source = next(source for source, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1])
    return Turn(source, before[source])


def most_without_repeating(sizes: Sequence[int], shares: Sequence[int]) -> int:
    """How many samples there can be before a source of that many samples runs out."""
    low, high = 0, sum(sizes)
    while low < high:
        middle = (low + high + 1) // 2
        fits = all(count <= size for count, size in zip(count_before(middle, shares), sizes, strict=True))
        low, high = (middle, high) if fits else (low, middle - 1)
    return low
