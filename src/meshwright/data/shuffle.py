"""A seeded order of n things that is computed, not kept: no list of a corpus's samples is ever held."""

from typing import Any

MASK = (1 << 64) - 1
ROUNDS = 6


def permute(position: int, size: int, key: tuple[int, ...]) -> int:
    """Where `position` goes in the order of `size` things that `key` names. One to one for every key.

    A Feistel network permutes the numbers of 2h bits, the fewest that hold `size`; a result outside is permuted
    again until it is inside (cycle walking), fewer than four times on average.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    word = 0
    for part in key:
        word = mix(word ^ (part & MASK))
    keys = [mix(word ^ number) for number in range(1, ROUNDS + 1)]
    while True:
        left, right = position >> half, position & low
        for round_key in keys:
            left, right = right, left ^ (mix(right ^ round_key) & low)
        position = left << half | right
        if position < size:
            return position


def mix(word: Any) -> Any:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014), on an int or a uint64 array."""
    word = (word + 0x9E3779B97F4A7C15) & MASK
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & MASK
    return word ^ (word >> 31)
