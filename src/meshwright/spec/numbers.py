"""What the checks need to know about whole numbers."""

from math import isqrt

from meshwright.spec.errors import SettingError

# No size that anybody means is larger, and up to here a divisor is found in a moment.
LARGEST = 2**40


def check_range(setting: str, value: float, low: float, high: float) -> None:
    """Raise SettingError for a value outside `low` to `high`, or for nan."""
    if not low <= value <= high:
        nearest = high if value > high else low
        limit = (
            f"must be at least {low}" if high >= LARGEST and not value > high else f"must lie between {low} and {high}"
        )
        raise SettingError(f"{setting} = {value}", limit, f"{setting} = {nearest}")


def nearest_multiple(number: int, of: int) -> int:
    """The multiple of `of`, at least one of it, nearest to `number`; the smaller of two."""
    return max(1, (2 * number + of - 1) // (2 * of)) * of


def divisors(number: int) -> list[int]:
    """All divisors of `number` (1 to LARGEST), smallest first."""
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return small + [number // n for n in reversed(small) if n * n < number]


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` nearest to `wanted`; the smaller of two."""
    return min(divisors(number), key=lambda n: abs(n - wanted))
