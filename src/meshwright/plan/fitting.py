"""A cluster's rates while they are fitted to figures, and the arithmetic of it."""

from collections.abc import Sequence
from math import exp, fsum, log
from typing import Any, cast

import msgspec

from meshwright.plan.rates import rates_of
from meshwright.record.calibration import Figure
from meshwright.spec import Cluster, Rates

# Of a rate, in the file: more than are sure.
DIGITS = 4


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """cluster: with the rates so far. figures: what they are fitted to. spread, misfit: as in Measured."""

    cluster: Cluster
    figures: tuple[Figure, ...]
    date: str
    spread: dict[str, float] = {}
    misfit: dict[str, float] = {}

    @property
    def rates(self) -> Rates:
        """So far."""
        return rates_of(self.cluster)

    def of(self, work: str) -> list[Figure]:
        """The figures of one kind of work."""
        return [figure for figure in self.figures if figure.work == work]

    def placed(self, **changes: Any) -> "Fit":
        """With other fields of the cluster."""
        return msgspec.structs.replace(self, cluster=msgspec.structs.replace(self.cluster, **changes))

    def noting(self, name: str, figures: Sequence[Figure], misfit: float | None = None) -> "Fit":
        """With how far repeats and sizes of what `name` comes from lay apart."""
        spread = self.spread | {name: rounded(max((figure.spread for figure in figures), default=0.0), 2)}
        misfits = self.misfit if misfit is None else self.misfit | {name: rounded(misfit, 2)}
        return msgspec.structs.replace(self, spread=spread, misfit=misfits)

    def with_rates(self, name: str, figures: Sequence[Figure], misfit: float | None, **rates: Any) -> "Fit":
        """With other rates, under the name of the first."""
        changed = msgspec.structs.replace(self.rates, **rates)
        return self.placed(rates=changed).noting(name, figures, misfit)

    def with_mean(self, name: str, figures: Sequence[Figure], shares: Sequence[float]) -> "Fit":
        """With one rate, the mean of what the sizes came to."""
        mean = geometric_mean(shares)
        misfit = max(abs(mean / share - 1) for share in shares)
        return self.with_rates(name, figures, misfit if len(shares) > 1 else None, **{name: mean})

    def rounded(self) -> "Fit":
        """With rates of so many digits as a reader can take in."""
        rates = {name: rounded(getattr(self.rates, name), DIGITS) for name in Rates.__struct_fields__}
        return self.placed(rates=Rates(**rates))


def rounded(value: Any, digits: int) -> Any:
    """A number of so many significant digits; of a collection each of its numbers."""
    if isinstance(value, dict):
        return {name: rounded(inner, digits) for name, inner in cast(dict[Any, Any], value).items()}
    if isinstance(value, tuple):
        return tuple(rounded(inner, digits) for inner in cast(tuple[Any, ...], value))
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def geometric_mean(values: Sequence[float]) -> float:
    """Of ratios: twice and half make one."""
    return exp(fsum(map(log, values)) / len(values))


def fit_line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Intercept and slope, neither below 0, of the line with the least squares of relative distances to `ys`."""
    rows = [(1 / y, x / y) for x, y in zip(xs, ys, strict=True)]
    ones, mixed, squares = (fsum(a[i] * a[j] for a in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    first, second = fsum(a[0] for a in rows), fsum(a[1] for a in rows)
    whole = ones * squares - mixed * mixed
    if whole > 1e-12 * ones * squares:
        intercept, slope = (first * squares - second * mixed) / whole, (second * ones - first * mixed) / whole
        if intercept >= 0 and slope >= 0:
            return intercept, slope
    # The better of the two lines that lack one of them.
    flat, steep = (first / ones, 0.0), (0.0, second / squares if squares else 0.0)
    return min(flat, steep, key=lambda line: fsum((line[0] * a[0] + line[1] * a[1] - 1) ** 2 for a in rows))
