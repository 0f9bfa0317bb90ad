"""report.html: an explanation as one self-contained page that opens offline."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import msgspec

from meshwright.explain import Explanation, MeasuredSteps
from meshwright.explain.words import bytes_text, counted, ranks_text, seconds_text, steps_text
from meshwright.record import replace_text
from meshwright.report.charts import (
    Figure,
    comparison_figure,
    drawn_ranks,
    loss_figure,
    rank_figure,
    run_figure,
)
from meshwright.report.details import grids
from meshwright.report.page import page_html
from meshwright.report.parts import chart, grid_section, numbers, prose, section, table, text, tile_row, word
from meshwright.report.pipeline import pipeline_figure, pipeline_words
from meshwright.report.words import (
    Row,
    Unit,
    bigram_entropy,
    count_text,
    device_memory,
    known_losses,
    loss_text,
    memory_line,
    memory_rows,
    memory_unit,
    run_line,
    run_rows,
    step_rows,
    time_unit,
    tokens_per_step,
    total,
    typical_mfu,
    yield_line,
)

# A blame row below this share of the step is noise.
WORTH_A_ROW = 0.001
BLAMED_RANKS = 8
# Lines of the tables of kernels, groups and gaps.
LISTED_ROWS = 10


def write_report(explanation: Explanation, path: Path) -> None:
    """Write the page whole or not at all."""
    replace_text(path, report_html(explanation))


def report_html(explanation: Explanation) -> str:
    """The page."""
    figures: dict[str, Figure] = {}
    body = "\n".join(sections(explanation, figures))
    return page_html(explanation.name, body, figures)


def sections(explanation: Explanation, figures: dict[str, Figure]) -> Iterable[str]:
    """The page from top to bottom; a section with nothing to say is left out, or says why."""
    yield f'<h1>{text(explanation.name)}</h1>\n<p class="soft">{text(run_line(explanation))}</p>'
    yield tiles(explanation)
    yield advice_section(explanation)
    yield found(explanation)
    if not explanation.traces:
        yield loss_section(explanation, figures)
    yield step_section(explanation, figures)
    yield pipeline_section(explanation, figures)
    if explanation.step is not None and len(explanation.step.ranks) > 1:
        yield rank_section(explanation.step, figures)
    yield from (grid_section(grid) for grid in grids(explanation, LISTED_ROWS))
    if not explanation.traces:
        yield memory_section(explanation, figures)
        yield run_section(explanation, figures)
    yield source_section(explanation)
    made = "explained by Meshwright; this page needs no network"
    yield f'<footer class="soft">{text(explanation.path)} · {made}</footer>'


def tiles(explanation: Explanation) -> str:
    """The headline numbers."""
    evaluations = explanation.evaluations
    cells: list[tuple[str, str, str]] = []
    if evaluations:
        first, last = loss_text(evaluations[0].held_out_loss), loss_text(evaluations[-1].held_out_loss)
        entropy = bigram_entropy(explanation)
        beside = f"{first} before" if len(evaluations) > 1 else "nats per token"
        beside += f"; bigram entropy {loss_text(entropy)}" if entropy is not None else ""
        cells.append(("Held-out loss", last, beside))
    if losses := known_losses(explanation):
        cells.append(("Training loss", loss_text(losses[-1].loss), f"{loss_text(losses[0].loss)} at first"))
    if explanation.step_s is not None:
        guess = explanation.prediction
        beside = f"{seconds_text(guess.step_s)} predicted" if guess is not None else "median, not profiled"
        cells.append(("Step time", seconds_text(explanation.step_s), beside))
        if tokens := tokens_per_step(explanation):
            mfu = typical_mfu(explanation)
            beside = f"MFU {mfu:.1%}" if mfu is not None else "no peak known for MFU"
            cells.append(("Tokens per second", count_text(tokens / explanation.step_s), beside))
    if explanation.step_s is None and explanation.step is not None:
        cells.append(("Step time", seconds_text(explanation.step.wall_s), "while profiled"))
    memory = explanation.memory
    if memory.measured is not None:
        beside = f"{bytes_text(memory.predicted.total())} predicted" if memory.predicted is not None else "fullest rank"
        cells.append(("Peak memory", bytes_text(memory.measured.total()), beside))
    if explanation.life.yield_ is not None:
        cells.append(("Yield", f"{explanation.life.yield_:.1%}", "useful over paid"))
    return tile_row(cells)


def found(explanation: Explanation) -> str:
    """Findings, faults and notes."""
    items = [(f.what, f.evidence, "") for f in explanation.findings]
    items += [
        (f"Fault on rank {f.rank}: {f.what}", f"attempt {f.attempt}, step {f.step}", "fault")
        for f in explanation.faults
    ]
    items += [(note, "", "note") for note in explanation.notes]
    if not items:
        return section("What stands out", "Nothing: no cause takes enough of the step to be worth a sentence.")
    lines = "".join(
        f'<li class="{kind}">{prose(what)}<span class="soft">{text(evidence)}</span></li>'
        for what, evidence, kind in items
    )
    return section("What stands out", "", f"<ul>{lines}</ul>")


def advice_section(explanation: Explanation) -> str:
    """What to change, what would gain most first; left out where there is nothing to advise on."""
    lines = "".join(
        f'<li class="advice"><span class="cause">{text(one.cause)}</span>{text(one.what)}'
        f'<span class="soft">{text(one.evidence)}. See docs/{text(one.where)}</span></li>'
        for one in explanation.advice
    )
    under = "Gains are what a step would be shorter by at most; they need not add up."
    return section("What to change", under, f"<ul>{lines}</ul>") if lines else ""


def source_section(explanation: Explanation) -> str:
    """The job, or what another trainer's run says of itself, word for word."""
    if explanation.program is None:
        title, source = "The job", explanation.job_toml
    else:
        title = "The program"
        source = msgspec.json.format(msgspec.json.encode(explanation.program), indent=2).decode()
    return f"<section><details><summary>{title}</summary><pre>{escape(source)}</pre></details></section>"


def loss_section(explanation: Explanation, figures: dict[str, Figure]) -> str:
    """Did it learn?"""
    figure = loss_figure(explanation)
    if figure is None:
        nothing = "No loss was recorded." if explanation.metrics else "No step has been recorded yet."
        return section("Loss", nothing)
    figures["loss"] = figure
    held_out = ", and held-out loss on documents never trained on" if explanation.evaluations else ""
    return section("Loss", f"Training loss of each step{held_out}.", chart("loss"))


def step_section(explanation: Explanation, figures: dict[str, Figure]) -> str:
    """The step account, predicted above measured."""
    prediction, step = explanation.prediction, explanation.step
    rows = step_rows(prediction.step if prediction is not None else None, step.account if step is not None else None)
    title = "Where a step's time goes"
    if not rows:
        return section(title, "Neither predicted nor measured: see the notes above.")
    unit = time_unit(max(total(rows, "predicted"), total(rows, "measured")))
    figures["step"] = comparison_figure(rows, unit, "time of a step")
    under = (
        f"Mean of {counted(len(step.ranks), 'rank')} over {steps_text(step.steps)}."
        if step is not None
        else "Predicted; not measured."
    )
    if explanation.difference is not None:
        under += " The difference is predicted minus measured."
    beside = overlapped_rows(explanation)
    return section(title, under, chart("step") + comparison_table("bucket", rows, unit, beside))


def pipeline_section(explanation: Explanation, figures: dict[str, Figure]) -> str:
    """What each rank of a pipeline runs when; nothing without one."""
    planned = explanation.prediction.pipeline if explanation.prediction is not None else None
    if planned is None:
        return ""
    unit = time_unit(max(passes[-1].end_s for passes in planned.ranks))
    figures["pipeline"] = pipeline_figure(planned, unit)
    return section("The pipeline", pipeline_words(planned), chart("pipeline"))


def overlapped_rows(explanation: Explanation) -> list[Row]:
    """Transfer hidden under compute: beside the account, never in it."""
    predicted = explanation.prediction.overlapped if explanation.prediction is not None else None
    measured = explanation.step.overlapped if explanation.step is not None else None
    return [
        Row(
            f"{name}, hidden",
            "transfer that ran under compute, not in the total",
            predicted.get(name, 0.0) if predicted is not None else None,
            measured.get(name, 0.0) if measured is not None else None,
        )
        for name in sorted((predicted or {}).keys() | (measured or {}).keys())
    ]


def rank_section(step: MeasuredSteps, figures: dict[str, Figure]) -> str:
    """Rank against rank, and who waited for whom."""
    unit = time_unit(step.wall_s)
    figures["ranks"] = rank_figure(step, unit)
    drawn = drawn_ranks(step)
    under = "Every rank's measured step, in the same colours."
    if len(drawn) < len(step.ranks):
        under = f"The {len(drawn)} of {len(step.ranks)} ranks that waited, or were waited for, most."
    return section("Rank by rank", under, chart("ranks") + blame_table(step, unit))


def blame_table(step: MeasuredSteps, unit: Unit) -> str:
    """The ranks that others waited for, the most waited for first; empty where nobody waited."""
    lines = [
        f'<tr><td class="word">rank {culprit}</td><td>{text(waiting(step, culprit))}</td>'
        f"{numbers([seconds / unit.size])}</tr>"
        for culprit, seconds in list(step.waited_for().items())[:BLAMED_RANKS]
        if step.longest_wait_for(culprit) > WORTH_A_ROW * step.wall_s
    ]
    head = f'<tr><th>waited for</th><th>by</th><th class="n">device time lost, {unit.name} a step</th></tr>'
    return table(head, lines) if lines else ""


def waiting(step: MeasuredSteps, culprit: int) -> str:
    """The ranks that waited for `culprit`, in words."""
    ranks = [rank for rank, waits in step.blame.items() if waits.get(culprit, 0.0) > WORTH_A_ROW * step.wall_s]
    return f"{ranks_text(ranks)}, at most {seconds_text(step.longest_wait_for(culprit))} each"


def memory_section(explanation: Explanation, figures: dict[str, Figure]) -> str:
    """The fullest rank's peak."""
    memory = explanation.memory
    rows = memory_rows(memory.predicted, memory.measured)
    if not rows:
        return section("Memory", "Neither predicted nor measured.")
    unit = memory_unit(max(total(rows, "predicted"), total(rows, "measured")))
    figures["memory"] = comparison_figure(rows, unit, "peak memory of the fullest rank")
    under = memory_line(explanation)
    if whole := device_memory(explanation):
        under += f"; a device has {bytes_text(whole)}"
    return section("Memory", f"{under}.", chart("memory") + comparison_table("part", rows, unit, []))


def run_section(explanation: Explanation, figures: dict[str, Figure]) -> str:
    """Every paid device-second."""
    account = explanation.life.account
    paid = account.total()
    if paid <= 0:
        return section("The run", "No rank has recorded its life yet.")
    figures["run"] = run_figure(explanation)
    lines = [
        f'<tr>{word(name)}<td class="meaning">{text(meaning)}</td>{numbers([seconds])}'
        f'<td class="n">{seconds / paid:.1%}</td></tr>'
        for name, meaning, seconds in run_rows(account)
    ]
    lines.append(
        f'<tr class="total"><td>paid</td><td class="meaning"></td>{numbers([paid])}<td class="n">100%</td></tr>'
    )
    heads = '<th class="meaning">meaning</th><th class="n">device-seconds</th><th class="n">share</th>'
    head = f"<tr><th>part</th>{heads}</tr>"
    return section("The run", f"Yield {yield_line(explanation)}.", chart("run") + table(head, lines))


def comparison_table(kind: str, rows: Sequence[Row], unit: Unit, beside: Sequence[Row]) -> str:
    """The chart's numbers; the swatches are its legend. Where nothing was predicted, only what was measured."""
    whole = total(rows, "measured")
    planned = any(row.predicted is not None for row in rows)
    names = (f"predicted, {unit.name}", "measured") if planned else (f"measured, {unit.name}",)
    head = "".join(f'<th class="n">{name}</th>' for name in names) + '<th class="n share">share</th>'
    head += '<th class="n">difference</th>' if planned else ""
    lines = [f'<tr><th>{kind}</th><th class="meaning">meaning</th>{head}</tr>']
    ends = Row(
        "total",
        "",
        total(rows, "predicted") if rows[0].predicted is not None else None,
        whole if rows[0].measured is not None else None,
    )
    for row, kind_of_row in [*((row, "") for row in rows), (ends, "total"), *((row, "beside") for row in beside)]:
        known = row.measured is not None and whole > 0 and kind_of_row != "beside"
        share = f"{(row.measured or 0.0) / whole:z.1%}" if known else ""
        both = row.predicted is not None and row.measured is not None
        gap = f"{((row.predicted or 0.0) - (row.measured or 0.0)) / unit.size:+,.1f}" if both else "-"
        sides = (row.predicted, row.measured) if planned else (row.measured,)
        lines.append(
            f'<tr class="{kind_of_row}">{word(row.name)}<td class="meaning">{text(row.meaning)}</td>'
            + numbers([None if v is None else v / unit.size for v in sides])
            + f'<td class="n share">{share}</td>'
            + (f'<td class="n">{gap}</td></tr>' if planned else "</tr>")
        )
    return table(lines[0], lines[1:])
