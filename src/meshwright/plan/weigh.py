"""What layouts are judged by, the less the better, from their seconds a step and their ranks."""

from collections.abc import Callable

Weigh = Callable[[float, int], float]


def by_time(step_s: float, ranks: int) -> float:
    """The shortest step is best."""
    del ranks
    return step_s


def by_cost(step_s: float, ranks: int) -> float:
    """The least time of all devices together for a step is best."""
    return step_s * ranks
