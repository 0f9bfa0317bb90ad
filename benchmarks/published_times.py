"""Predicted step times against published ones, source by source: errors, intervals, and which layout is named first."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import mean, median, quantiles

import msgspec
from published_rows import Row

from meshwright.plan import predict_step
from meshwright.plan.interval import step_interval

# A group of fewer rows of one trainer and device gets no factor; a source of fewer is judged by its worst row.
FACTOR_ROWS, JUDGED_BY_WORST = 30, 20
# The share of a group's rows that its factor is fitted on.
FITTED_SHARE = 4
MEDIAN_BAR, TAIL_BAR, WORST_BAR = 0.08, 0.20, 0.20
# Also by the mean, where a source's own authors did: vTrain's report 14.7% on these.
MEAN_BARS = {"vtrain_multi": 0.12}
COVERED_BARS = (0.75, 0.90)
# A choice is asked for where so many layouts were measured.
CHOICES, FIRST_BAR, REGRET_BAR = 8, 0.10, 0.04


class Timed(msgspec.Struct, frozen=True, kw_only=True):
    """A row and what was predicted of it. measured_s: the median of rows alike; fitted: whether its group's factor was
    fitted on it; factor: that; inside: whether the 80% interval holds it."""

    row: Row
    measured_s: float
    predicted_s: float
    factor: float
    fitted: bool
    inside: bool

    @property
    def error(self) -> float:
        """Relative, above 0 where predicted too slow."""
        return self.predicted_s * self.factor / self.measured_s - 1


class Times(msgspec.Struct, frozen=True, kw_only=True):
    """One source. errors are of rows that nothing was fitted on; missed: bars that were."""

    source: str
    rows: int
    median: float
    tail: float
    mean: float
    worst: float
    bias: float
    covered: float
    regrets: tuple[float, ...]
    crossings: tuple[int, int]
    missed: tuple[str, ...]


def report_times(rows: Iterable[Row]) -> tuple[list[Times], dict[str, tuple[int, float]]]:
    """Every source's errors, and each group's (rows, factor)."""
    timed = predict_rows([row for row in rows if row.step_s > 0])
    groups = {t.row.group: t.factor for t in timed}
    counts = {group: sum(t.row.group == group for t in timed) for group in groups}
    sources = sorted({t.row.source for t in timed})
    found = [report_source(source, [t for t in timed if t.row.source == source]) for source in sources]
    return found, {group: (counts[group], factor) for group, factor in groups.items()}


def predict_rows(rows: Sequence[Row]) -> list[Timed]:
    """Each row predicted, with the factor of its group."""
    alike: dict[str, list[float]] = defaultdict(list)
    groups: dict[str, list[Row]] = defaultdict(list)
    accounts = {row.id: predict_step(row.job)[0] for row in rows}
    for row in rows:
        alike[row.alike].append(row.step_s)
        groups[row.group].append(row)
    timed: list[Timed] = []
    for members in groups.values():
        fitted = set[str]()
        factor = 1.0
        if len(members) >= FACTOR_ROWS:
            lowest = sorted(members, key=lambda row: hashlib.sha256(row.id.encode()).hexdigest())
            fitted = {row.id for row in lowest[: len(members) // FITTED_SHARE]}
            ratios = [median(alike[row.alike]) / accounts[row.id].total() for row in members if row.id in fitted]
            factor = median(ratios)
        for row in members:
            low_s, high_s = step_interval(row.job, accounts[row.id], held=bool(fitted))
            measured_s = median(alike[row.alike])
            timed.append(
                Timed(
                    row=row,
                    measured_s=measured_s,
                    predicted_s=accounts[row.id].total(),
                    factor=factor,
                    fitted=row.id in fitted,
                    inside=low_s * factor <= measured_s <= high_s * factor,
                )
            )
    return timed


def report_source(source: str, timed: Sequence[Timed]) -> Times:
    """One source's errors against the bars."""
    judged = [t for t in timed if not t.fitted]
    errors = sorted(abs(t.error) for t in judged)
    tail = quantiles(errors, n=10, method="inclusive")[-1] if len(errors) > 1 else errors[0]
    few = len(timed) < JUDGED_BY_WORST
    regrets, crossings = tuple(regrets_of(timed)), crossings_of(timed)
    covered = mean(t.inside for t in judged)
    bars = [
        ("worst", errors[-1], WORST_BAR, few),
        ("median", median(errors), MEDIAN_BAR, not few),
        ("90th percentile", tail, TAIL_BAR, not few),
        ("mean", mean(errors), MEAN_BARS.get(source, 1.0), source in MEAN_BARS),
        ("worst choice", max(regrets, default=0.0), FIRST_BAR, True),
        ("median regret", median(regrets) if regrets else 0.0, REGRET_BAR, True),
    ]
    asked = [(name, value, bar) for name, value, bar, is_asked in bars if is_asked]
    missed = [f"{name} {value:.1%} above {bar:.0%}" for name, value, bar in asked if value > bar]
    if not few and not COVERED_BARS[0] <= covered <= COVERED_BARS[1]:
        missed.append(f"80% intervals hold {covered:.0%}")
    if crossings[0] < crossings[1]:
        missed.append(f"{crossings[1] - crossings[0]} of {crossings[1]} crossings on the wrong side")
    return Times(
        source=source,
        rows=len(judged),
        median=median(errors),
        tail=tail,
        mean=mean(errors),
        worst=errors[-1],
        bias=median(t.predicted_s / t.measured_s for t in timed) - 1,
        covered=covered,
        regrets=regrets,
        crossings=crossings,
        missed=tuple(missed),
    )


def regrets_of(timed: Sequence[Timed]) -> list[float]:
    """For each model, cluster and batch with layouts enough: how much slower than the best the one named first was."""
    names = ("framework", "model", "n_layers", "hidden", "n_heads", "seq_len", "gpu", "n_gpus", "gbs", "precision")
    groups: dict[tuple[str, ...], dict[str, Timed]] = defaultdict(dict)
    for one in timed:
        groups[tuple(one.row.cells[name] for name in names)][one.row.alike] = one
    found: list[float] = []
    for members in groups.values():
        if len(members) >= CHOICES:
            first = min(members.values(), key=lambda t: t.predicted_s)
            found.append(first.measured_s / min(t.measured_s for t in members.values()) - 1)
    return sorted(found)


def crossings_of(timed: Sequence[Timed]) -> tuple[int, int]:
    """Of pairs on as many GPUs, one gathered and one cut along tensor or pipeline: how many are told right, of all.

    By seconds a sequence, since batches differ.
    """
    groups: dict[tuple[str, ...], list[Timed]] = defaultdict(list)
    for one in timed:
        cells = one.row.cells
        groups[cells["n_layers"], cells["hidden"], cells["gpu"], cells["n_gpus"]].append(one)
    right = pairs = 0
    for members in groups.values():
        gathered = [t for t in members if t.row.job.trainer.gathers and t.row.job.layout.tensor == 1]
        cut = [t for t in members if not t.row.job.trainer.gathers and t.row.job.layout.tensor > 1]
        for one in gathered:
            for other in cut:
                batch = other.row.job.data.global_batch / one.row.job.data.global_batch
                pairs += 1
                faster = one.measured_s * batch < other.measured_s
                right += (one.predicted_s * batch < other.predicted_s) == faster
    return right, pairs
