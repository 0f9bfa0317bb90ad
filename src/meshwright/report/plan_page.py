"""plan.html: a plan as one self-contained page."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from meshwright.plan import Plan
from meshwright.plan.cost import three_figures
from meshwright.plan.curve import KNEE, Curve
from meshwright.record import Prediction, replace_text
from meshwright.report.charts import AXES_HEIGHT, DRAWN_RANKS, Figure, stacked
from meshwright.report.colours import COLOURS
from meshwright.report.details import Grid
from meshwright.report.page import page_html
from meshwright.report.parts import chart, grid_section, section, text, tile_row
from meshwright.report.pipeline import pipeline_figure, pipeline_words
from meshwright.report.plan import cost_rows, gb, layout_cells, long_text, own_title, seconds_text
from meshwright.report.words import count_text, memory_unit, time_unit

# Layouts drawn beside each other, and those listed.
DRAWN_LAYOUTS, LISTED_LAYOUTS, LISTED_REJECTIONS = 8, 20, 30
# Characters of a layout's name that fit beside its bar.
NAME_LENGTH = 60


def write_plan(plan: Plan, path: Path) -> None:
    """Write the page whole or not at all."""
    figures: dict[str, Figure] = {}
    body = "\n".join(sections(plan, figures))
    replace_text(path, page_html(f"{plan.model} on {plan.cluster.label()}", body, figures))


def sections(plan: Plan, figures: dict[str, Figure]) -> Iterable[str]:
    """The page from top to bottom."""
    tokens = plan.global_batch * plan.sequence
    under = f"{plan.global_batch:,} sequences of {plan.sequence:,} tokens, {tokens:,} tokens a step"
    yield f'<h1>{text(plan.model)} on {text(plan.cluster.label())}</h1>\n<p class="soft">{text(under)}</p>'
    yield f'<h2 class="whose">{text(own_title(plan))}</h2><p class="soft">{text(first_words(plan))}</p>'
    yield tiles(plan)
    yield section("Verdict", plan.verdict)
    if plan.costs is not None:
        yield cost_section(plan)
    if plan.job.step_s:
        yield step_section(plan, figures)
    yield memory_section(plan, figures)
    if plan.job.pipeline is not None:
        unit = time_unit(max(passes[-1].end_s for passes in plan.job.pipeline.ranks))
        figures["pipeline"] = pipeline_figure(plan.job.pipeline, unit)
        yield section("The pipeline over time", pipeline_words(plan.job.pipeline), chart("pipeline"))
    if plan.curve is not None and plan.curve.points:
        yield curve_section(plan, plan.curve, figures)
    if plan.ranked:
        yield grid_section(layouts_grid(plan))
    if plan.rejected:
        yield grid_section(rejections_grid(plan))
    notes = "".join(f"<li>{text(note)}</li>" for note in plan.job.notes)
    yield section("How far to trust it", "", f"<ul>{notes}</ul>")
    yield '<footer class="soft">planned by Meshwright; this page needs no network</footer>'


def tiles(plan: Plan) -> str:
    """The headline numbers of the job's own layout."""
    job, cells = plan.job, list[tuple[str, str, str]]()
    given = "" if plan.job_fits else ", if it fitted"
    if not plan.job_fits:
        missing = gb(job.memory.total() - plan.capacity_bytes)
        cells.append(("Fit", "Does not fit", f"{missing} more than a device has"))
    if job.step_s:
        low_s, high_s = job.step_interval_s
        between = f"80%: {seconds_text(low_s)} to {seconds_text(high_s)}"
        cells.append((f"Step{given}", seconds_text(job.step_s), between))
        mfu = f"MFU {job.step.useful / job.step_s:.1%}"
        cells.append((f"Tokens per second{given}", three_figures(job.tokens_per_s), mfu))
    cells += [(f"{name}{given}", value, under) for name, value, under in cost_tiles(plan)]
    low, high = job.memory_interval_bytes
    cells.append(("Memory", gb(job.memory.total()), f"80%: {gb(low)} to {gb(high)}, of {gb(plan.capacity_bytes)}"))
    cells.append(("Layout", f"{job.layout.world_size:,} ranks", job.layout.label()))
    return tile_row(cells)


def first_words(plan: Plan) -> str:
    """What is ranked first, where the figures below are of another layout."""
    whose = "The figures below are of this layout."
    if not plan.ranked:
        return whose
    first = plan.ranked[0]
    if first.layout == plan.job.layout:
        return f"{whose} It is ranked first of all that fit."
    speed = f", {seconds_text(first.step_s)} a step, {three_figures(first.tokens_per_s)} tokens/s"
    return f"{whose} Ranked first of all that fit is {first.layout.label()}{speed if first.step_s else ''}."


def cost_tiles(plan: Plan) -> list[tuple[str, str, str]]:
    """What the job's own layout costs: all of the tokens where somebody said how many, else a million."""
    if plan.costs is None:
        return []
    cost = plan.costs.own
    of_tokens = f"for {count_text(plan.costs.tokens or 0)} tokens"
    cells: list[tuple[str, str, str]] = []
    if cost.run_s is not None:
        cells.append(("Time", long_text(cost.run_s), of_tokens))
    if cost.run is not None:
        cells.append(("Cost", three_figures(cost.run), of_tokens))
    elif cost.million_tokens is not None:
        cells.append(("Cost", three_figures(cost.million_tokens), "for 1 M tokens"))
    return cells


def cost_section(plan: Plan) -> str:
    """Costs and times of the job's layout and of better ones, as the screen of text has them."""
    rows = cost_rows(plan.costs, plan.goal.objective, fits=plan.job_fits)
    priced = plan.costs is not None and plan.costs.own.step is not None
    under = "In the currency of cluster.price_per_device_hour, for the devices that a layout uses. " if priced else ""
    lines = "".join(f"<li>{text(line)}</li>" for _, line in rows)
    return section(rows[0][0], f"{under}Startup, checkpoints and failures are not in it.", f"<ul>{lines}</ul>")


def compared(plan: Plan) -> list[tuple[str, Prediction]]:
    """The job's own layout, if it fits or nothing else does, and the first in rank."""
    first = list(enumerate(plan.ranked[:DRAWN_LAYOUTS], 1))
    own = [(f"this job: {short(plan.job)}", plan.job)] if plan.job_fits or not plan.ranked else []
    return own + [(f"{place}. {short(p)}", p) for place, p in first if p.layout != plan.job.layout]


def short(prediction: Prediction) -> str:
    """A layout's name, cut to what fits beside a bar."""
    name = prediction.layout.label()
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 3]}..."


def step_section(plan: Plan, figures: dict[str, Figure]) -> str:
    """Seconds by bucket, layout beside layout."""
    drawn = compared(plan)
    unit = time_unit(max(p.step_s for _, p in drawn))
    rows = [dict(p.step.rows()) for _, p in drawn]
    names = [name for name in rows[0] if any(row[name] > 0 for row in rows)]
    figures["step"] = stacked(
        {name: [row[name] / unit.size for row in rows] for name in names},
        [name for name, _ in drawn],
        f"time of a step, {unit.name}",
    )
    add_legend(figures["step"], len(drawn))
    return section("Where a step's time would go", f"By bucket; {drawn_words(plan)}.", chart("step"))


def drawn_words(plan: Plan) -> str:
    """Whose steps are drawn."""
    if not plan.ranked:
        return f"of this job's layout{'' if plan.job_fits else ', which does not fit: of a step that cannot be made'}"
    own = "this job's layout and " if plan.job_fits else ""
    order = {"cheapest": "cheapest", "fewest": "best"}.get(plan.goal.objective, "fastest")
    return f"{own}the {order} layouts that fit"


def add_legend(figure: Figure, bars: int) -> None:
    """A legend below the axis and its title, which are nearer, as a share of the chart, where there are few bars."""
    figure["layout"] |= {"showlegend": True, "legend": {"orientation": "h", "y": -0.2 - 0.6 / bars}}
    figure["layout"]["height"] += AXES_HEIGHT


def memory_section(plan: Plan, figures: dict[str, Figure]) -> str:
    """Bytes by term, rank beside rank along the pipeline, against what a device has."""
    accounts = plan.memories[:DRAWN_RANKS]
    unit = memory_unit(max(plan.capacity_bytes, *(account.total() for account in accounts)))
    rows = [dict(account.rows()) for account in accounts]
    bars = [f"pipeline rank {place}" for place in range(len(rows))] if len(rows) > 1 else ["every rank"]
    figure = stacked(
        {name: [row[name] / unit.size for row in rows] for name in rows[0] if any(row[name] > 0 for row in rows)},
        bars,
        f"peak memory, {unit.name}",
    )
    limit = plan.capacity_bytes / unit.size
    line: Figure = {"color": "#d9483b", "dash": "dot", "width": 1.5}
    figure["layout"] |= {
        "shapes": [{"type": "line", "x0": limit, "x1": limit, "y0": 0, "y1": 1, "yref": "paper", "line": line}],
    }
    add_legend(figure, len(rows))
    figures["memory"] = figure
    more = f"; the first {DRAWN_RANKS} of {len(plan.memories)}" if len(plan.memories) > DRAWN_RANKS else ""
    under = f"Of this job's layout, at the step's peak{more}. The dotted line is what a device has."
    return section("Memory by stage", under, chart("memory"))


def curve_section(plan: Plan, curve: Curve, figures: dict[str, Figure]) -> str:
    """Speed against the number of devices, between what the steps' intervals make of it, beside a straight line."""
    points, tokens = curve.points, plan.global_batch * plan.sequence
    devices = [point.devices for point in points]
    slow, fast = ([tokens / point.step_interval_s[end] for point in points] for end in (1, 0))
    most = max(point.tokens_per_s / point.devices for point in points)
    edge: Figure = {"type": "scatter", "mode": "lines", "x": devices, "line": {"width": 0}, "hoverinfo": "skip"}
    figures["curve"] = {
        "data": [
            edge | {"y": slow, "showlegend": False},
            edge | {"y": fast, "fill": "tonexty", "fillcolor": "rgba(79,155,217,0.25)", "name": "80% interval"},
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": "predicted",
                "x": devices,
                "y": [point.tokens_per_s for point in points],
                "line": {"color": COLOURS["comm.shard"]},
                "customdata": [f"{point.efficiency:.0%}" for point in points],
                "hovertemplate": "%{x} devices: %{y:,.0f} tokens/s (%{customdata} efficient)<extra></extra>",
            },
            {
                "type": "scatter",
                "mode": "lines",
                "name": "every device used as at best",
                "x": devices,
                "y": [most * count for count in devices],
                "line": {"color": COLOURS["other"], "dash": "dash", "width": 1.2},
                "hoverinfo": "skip",
            },
        ],
        "layout": {
            "height": 340,
            "xaxis": {"title": {"text": "devices"}, "type": "log", "tickvals": devices},
            "yaxis": {"title": {"text": "tokens per second"}, "type": "log"},
            "legend": {"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom"},
        },
    }
    under = "The fastest layout of each number of devices, at the job's batch."
    if curve.knee is not None:
        under += f" Up to {curve.knee:,} of them are used at least {KNEE:.0%} as well as at best."
    if curve.noise is not None:
        under += (
            f" Beyond a batch of {curve.noise.noise_tokens:,.0f} tokens, the noise scale, more replicas hardly pay."
        )
    return section("Scaling", under, chart("curve"))


def layouts_grid(plan: Plan) -> Grid:
    """The ranking, with intervals."""
    rows: list[tuple[str, ...]] = []
    for place, prediction in enumerate(plan.ranked[:LISTED_LAYOUTS], 1):
        cells = layout_cells(prediction, own=prediction.layout == plan.job.layout)
        between = " - ".join(map(seconds_text, prediction.step_interval_s)) if prediction.step_s else "-"
        rows.append((f"{place}. {cells[0]}", *cells[1:6], between, *cells[6:]))
    return Grid(
        title="Layouts that fit",
        under=f"The best {len(rows)} of all that fit; within 1% of each other the simpler first.",
        words=("layout",),
        numbers=("zero", "micro", "recompute", "ranks", "step", "80% interval", "tokens/s", "MFU", "memory"),
        rows=tuple(rows),
    )


def rejections_grid(plan: Plan) -> Grid:
    """What cannot run, why, and what nearest can."""
    listed: Sequence[tuple[str, ...]] = [
        (r.layout.label(), r.reason, r.nearest or "none found") for r in plan.rejected[:LISTED_REJECTIONS]
    ]
    return Grid(
        title="Layouts that cannot run",
        under=f"{len(listed)} of {len(plan.rejected)}.",
        words=("layout", "why", "nearest that works"),
        numbers=(),
        rows=tuple(listed),
    )
