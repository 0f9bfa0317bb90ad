"""A pipeline's schedule as predicted: rank by time."""

from meshwright.record import PlannedPass, PlannedPipeline
from meshwright.report.charts import AXES_HEIGHT, CLOSE_BAR_HEIGHT, DRAWN_RANKS, Figure
from meshwright.report.colours import COLOURS
from meshwright.report.text import blocks_held
from meshwright.report.words import Unit

# Passes drawn of each rank: more are too narrow to be seen.
DRAWN_PASSES = 128
# How much of its colour the last of a rank's stages loses.
PALER = 0.55
# Each kind of pass in words.
PASSES = {"F": "forward", "B": "backward", "I": "gradients of inputs", "W": "gradients of weights"}


def pipeline_figure(planned: PlannedPipeline, unit: Unit) -> Figure:
    """Each rank's passes along time, in a colour for each kind; numbered by microbatch where there is room."""
    rows = [(f"rank {rank}", passes[:DRAWN_PASSES]) for rank, passes in enumerate(planned.ranks[:DRAWN_RANKS])]
    kinds = [kind for kind in PASSES if any(one.kind == kind for _, passes in rows for one in passes)]
    layout: Figure = {
        "height": AXES_HEIGHT + CLOSE_BAR_HEIGHT * len(rows),
        "barmode": "overlay",
        "bargap": 0.15,
        "showlegend": True,
        "legend": {"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom"},
        "xaxis": {"title": {"text": f"time from the step's begin, {unit.name}"}, "rangemode": "tozero"},
        "yaxis": {"autorange": "reversed", "type": "category", "showgrid": False},
        "uniformtext": {"mode": "hide", "minsize": 8},
    }
    turns = {stage: stage // len(planned.ranks) for stage in range(len(planned.stage_ranks))}
    return {"data": [pass_trace(kind, rows, unit, turns) for kind in kinds], "layout": layout}


def pass_trace(kind: str, rows: list[tuple[str, tuple[PlannedPass, ...]]], unit: Unit, turns: dict[int, int]) -> Figure:
    """Every pass of one kind; turns: of each stage, how many its rank holds before it."""
    last = max(turns.values())
    found = [(name, one) for name, passes in rows for one in passes if one.kind == kind]
    return {
        "type": "bar",
        "orientation": "h",
        "name": PASSES[kind],
        "y": [name for name, _ in found],
        "base": [one.begin_s / unit.size for _, one in found],
        "x": [(one.end_s - one.begin_s) / unit.size for _, one in found],
        "marker": {
            "color": COLOURS[PASSES[kind]],
            "line": {"width": 0.5},
            "opacity": [1 - PALER * turns[one.stage] / last if last else 1 for _, one in found],
        },
        "text": [str(one.microbatch) for _, one in found],
        "textposition": "inside",
        "insidetextanchor": "middle",
        "textangle": 0,
        "customdata": [one.stage for _, one in found],
        "hovertemplate": f"{PASSES[kind]} of microbatch %{{text}}, stage %{{customdata}}: %{{x:,.2f}}<extra></extra>",
    }


def pipeline_words(planned: PlannedPipeline) -> str:
    """The schedule, the stages, and what of the step is not drawn."""
    ranks = len(planned.ranks)
    words = f"As predicted; numbers are microbatches. {blocks_held(planned)}"
    if len(planned.stage_ranks) > ranks:
        words += "; the later of a rank's stages are paler"
    if ranks > DRAWN_RANKS:
        words += f"; the first {DRAWN_RANKS} of {ranks} ranks"
    if any(len(passes) > DRAWN_PASSES for passes in planned.ranks):
        words += "; the step's beginning"
    elif planned.left_out:
        words += f"; {planned.left_out} microbatches like those in the middle are left out"
    return words + "."
