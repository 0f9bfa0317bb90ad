"""A figure of one source's rows and the bar it is held to."""

from collections.abc import Sequence
from statistics import quantiles
from typing import Any

import msgspec
from published_rows import Row


class Bar(msgspec.Struct, frozen=True, kw_only=True):
    """value: what was found over so many rows. most, least: what it may be; None: shown without a bar."""

    source: str
    figure: str
    rows: int
    value: float
    most: float | None = None
    least: float | None = None

    @property
    def met(self) -> bool:
        """Whether the figure is where it has to be."""
        return (self.most is None or self.value <= self.most) and (self.least is None or self.value >= self.least)

    def line(self) -> str:
        """For people."""
        limits = [f"at most {self.most:.1%}"] if self.most is not None else []
        limits += [f"at least {self.least:.1%}"] if self.least is not None else []
        verdict = "" if not limits else f"  {'ok' if self.met else 'MISSED'} ({', '.join(limits)})"
        return f"{self.source:22} {self.figure:44} {self.rows:5} rows {self.value:8.1%}{verdict}"

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return msgspec.to_builtins(self) | {"met": self.met}


def percentile_90(values: Sequence[float]) -> float:
    """The 90th percentile, between the two values around it."""
    return quantiles(values, n=10, method="inclusive")[-1] if len(values) > 1 else values[0]


def by_source(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Each source's rows, in the order of its first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.source, []).append(row)
    return found
