"""Predicted step times against published ones, source by source: errors, intervals, and which layout is named first."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from statistics import mean, median

import msgspec
from published_rows import Row
from validation_bars import Bar, percentile_90

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


def report_time(rows: Sequence[Row]) -> tuple[list[Bar], list[str]]:
    """Every source's figures, and a line for the factor of each group that has one."""
    timed = predict_rows([row for row in rows if row.step_s > 0])
    groups: dict[str, list[Timed]] = defaultdict(list)
    sources: dict[str, list[Timed]] = defaultdict(list)
    for one in timed:
        groups[one.row.group].append(one)
        sources[one.row.source].append(one)
    factors = [
        f"{group}: factor {members[0].factor:.3f}, fitted on {sum(t.fitted for t in members)} of {len(members)} rows"
        for group, members in groups.items()
        if any(t.fitted for t in members)
    ]
    return [bar for source, members in sources.items() for bar in judge(source, members)], factors


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


def judge(source: str, timed: Sequence[Timed]) -> list[Bar]:
    """One source's figures against the bars. Errors are of rows that nothing was fitted on."""
    judged = [t for t in timed if not t.fitted]
    errors, few = [abs(t.error) for t in judged], len(timed) < JUDGED_BY_WORST
    regrets, (right, pairs) = regrets_of(timed), crossings_of(timed)

    def bar(figure: str, value: float, rows: int, *, most: float | None = None, least: float | None = None) -> Bar:
        return Bar(source=source, figure=figure, rows=rows, value=value, most=most, least=least)

    count = len(judged)
    found = [
        bar("step time, median error", median(errors), count, most=None if few else MEDIAN_BAR),
        bar("step time, 90th percentile", percentile_90(errors), count, most=None if few else TAIL_BAR),
        bar("step time, mean error", mean(errors), count, most=MEAN_BARS.get(source)),
        bar("step time, worst error", max(errors), count, most=WORST_BAR if few else None),
        bar("step time, bias before any factor", median(t.predicted_s / t.measured_s for t in timed) - 1, len(timed)),
    ]
    low, high = (None, None) if few else COVERED_BARS
    found.append(bar("step time, in its 80% interval", mean(t.inside for t in judged), count, least=low, most=high))
    if regrets:
        found.append(bar("first in rank, slower than best, worst", max(regrets), len(regrets), most=FIRST_BAR))
        found.append(bar("first in rank, slower than best, median", median(regrets), len(regrets), most=REGRET_BAR))
    if pairs:
        found.append(bar("gathered or cut, told right", right / pairs, pairs, least=1.0))
    return found


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
