"""Charts as plotly's own JSON: plain dicts, so that drawing them needs plotly.js and no Python."""

from collections.abc import Sequence
from typing import Any

from meshwright.account import StepAccount
from meshwright.explain import Explanation, MeasuredSteps
from meshwright.record import Metrics
from meshwright.report.colours import COLOURS
from meshwright.report.words import Row, Unit, bigram_entropy, known_losses, run_rows, step_rows

Figure = dict[str, Any]

# Beyond this a curve shows means of neighbouring steps: the eye sees no more, and the page stays small.
MOST_POINTS = 1500
# Ranks drawn one by one before the chart would be a wall.
DRAWN_RANKS = 32
BAR_HEIGHT = 44
# With more bars than this they are drawn closer together.
FEW_BARS = 8
CLOSE_BAR_HEIGHT = 26
AXES_HEIGHT = 68
# Less of a bar is nothing that can be seen.
LEAST_SHARE = 1e-6


def loss_figure(explanation: Explanation) -> Figure | None:
    """Training and held-out loss over steps."""
    points = thinned(known_losses(explanation))
    held_out = [(line.step, line.held_out_loss) for line in explanation.evaluations]
    if not points and not held_out:
        return None
    training: Figure = {
        "type": "scatter",
        "mode": "lines",
        "name": "training",
        "x": [step for step, _ in points],
        "y": [loss for _, loss in points],
        "line": {"color": COLOURS["comm.shard"], "width": 1.8},
        "hovertemplate": "%{y:.3f}",
    }
    evaluated: Figure = {
        "type": "scatter",
        # A line between only two points would pretend to know the way.
        "mode": "lines+markers" if len(held_out) > 2 else "markers",
        "name": "held-out",
        "x": [step for step, _ in held_out],
        "y": [loss for _, loss in held_out],
        "line": {"color": COLOURS["imbalance"], "width": 1.5, "dash": "dot"},
        "marker": {"size": 8},
        "cliponaxis": False,
        "hovertemplate": "%{y:.3f}",
    }
    entropy = bigram_entropy(explanation)
    known = entropy is not None and bool(points)
    beaten: Figure = {
        "type": "scatter",
        "mode": "lines",
        "name": "bigram entropy of the corpus",
        "x": [points[0][0], points[-1][0]] if known else [],
        "y": [entropy, entropy] if known else [],
        "line": {"color": COLOURS["other"], "width": 1.2, "dash": "dash"},
        "hovertemplate": "%{y:.3f}",
    }
    layout: Figure = {
        "height": 340,
        "hovermode": "x unified",
        "xaxis": {"title": {"text": "step"}, "rangemode": "tozero"},
        "yaxis": {"title": {"text": "loss, nats per token"}},
        "legend": {"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom"},
    }
    return {"data": [trace for trace in (training, evaluated, beaten) if trace["x"]], "layout": layout}


def thinned(metrics: Sequence[Metrics]) -> list[tuple[int, float | None]]:
    """(steps done, loss), neighbouring steps averaged where there are many; None where a loss was not finite."""
    width = -(-len(metrics) // MOST_POINTS) or 1
    points: list[tuple[int, float | None]] = []
    for begin in range(0, len(metrics), width):
        part = metrics[begin : begin + width]
        losses = [line.loss for line in part if line.loss is not None]
        # Steps count from 0, and held-out losses stand at the steps that are done.
        points.append((part[-1].step + 1, sum(losses) / len(losses) if len(losses) == len(part) else None))
    return points


def comparison_figure(rows: Sequence[Row], unit: Unit, axis: str) -> Figure:
    """Predicted above measured, each one bar stacked of the same colours."""
    sides = [name for name in ("predicted", "measured") if any(getattr(row, name) is not None for row in rows)]
    stacks = {row.name: [(getattr(row, side) or 0.0) / unit.size for side in sides] for row in rows}
    return stacked(stacks, sides, f"{axis}, {unit.name}")


def rank_figure(step: MeasuredSteps, unit: Unit) -> Figure:
    """Each rank's measured step, stacked by bucket."""
    ranks = drawn_ranks(step)
    accounts = {rank: step_rows(None, step.ranks[rank]) for rank in ranks}
    names = [row.name for row in step_rows(None, sum_of([step.ranks[rank] for rank in ranks]))]
    values = {rank: {row.name: row.measured or 0.0 for row in rows} for rank, rows in accounts.items()}
    stacks = {name: [values[rank].get(name, 0.0) / unit.size for rank in ranks] for name in names}
    return stacked(stacks, [f"rank {rank}" for rank in ranks], f"time of a step, {unit.name}")


def drawn_ranks(step: MeasuredSteps) -> list[int]:
    """The ranks to draw: all, or those that others waited for most and longest themselves."""
    ranks = sorted(step.ranks)
    if len(ranks) <= DRAWN_RANKS:
        return ranks
    waited_for = step.waited_for()
    ranks.sort(key=lambda rank: -(waited_for.get(rank, 0.0) + step.ranks[rank].straggler))
    return sorted(ranks[:DRAWN_RANKS])


def sum_of(accounts: Sequence[StepAccount]) -> StepAccount:
    """All accounts together."""
    total = StepAccount()
    for account in accounts:
        total = total + account
    return total


def run_figure(explanation: Explanation) -> Figure:
    """The paid device-seconds as one bar."""
    stacks = {name: [seconds] for name, _, seconds in run_rows(explanation.life.account)}
    return stacked(stacks, ["paid"], "device-seconds, all ranks and attempts")


def stacked(stacks: dict[str, list[float]], bars: Sequence[str], axis: str) -> Figure:
    """Horizontal bars, first on top. A table beside the chart is its legend."""
    totals = [sum(values[i] for values in stacks.values()) for i in range(len(bars))]
    data = [bar_trace(name, values, bars, totals) for name, values in stacks.items()]
    layout: Figure = {
        "height": AXES_HEIGHT + (BAR_HEIGHT if len(bars) <= FEW_BARS else CLOSE_BAR_HEIGHT) * len(bars),
        "barmode": "relative",
        "bargap": 0.3,
        "showlegend": False,
        "xaxis": {"title": {"text": axis}, "separatethousands": True},
        "yaxis": {"autorange": "reversed", "type": "category", "showgrid": False},
        "uniformtext": {"mode": "hide", "minsize": 11},
    }
    return {"data": data, "layout": layout}


def bar_trace(name: str, values: Sequence[float], bars: Sequence[str], totals: Sequence[float]) -> Figure:
    """One bucket's segment in every bar, labelled where the label fits."""
    shares = [value / total if total else 0.0 for value, total in zip(values, totals, strict=True)]
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        # What rounding left below zero would put the axis's begin there.
        "x": [value if abs(share) > LEAST_SHARE else 0.0 for value, share in zip(values, shares, strict=True)],
        "y": list(bars),
        "marker": {"color": COLOURS[name]},
        "text": [f"{name} {share:.0%}" for share in shares],
        "textposition": "inside",
        "insidetextanchor": "middle",
        "textangle": 0,
        "customdata": [f"{share:.1%}" for share in shares],
        "hovertemplate": f"{name}: %{{x:,.1f}} (%{{customdata}})<extra></extra>",
    }
