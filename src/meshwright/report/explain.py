"""An explanation as one screen of text, and as JSON."""

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING

import msgspec

from meshwright.account import StepAccount
from meshwright.explain import Explanation, MeasuredSteps
from meshwright.explain.words import counted, steps_text
from meshwright.report.details import Grid, advice_text, grids
from meshwright.report.text import labelled, plain, show
from meshwright.report.words import (
    Row,
    Unit,
    learned_line,
    memory_rows,
    memory_unit,
    run_line,
    run_rows,
    speed_line,
    step_rows,
    time_unit,
    total,
    yield_line,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# Ranks listed before the table would fill the screen.
LISTED_RANKS = 8
# Lines of the tables that a person looks up, and does not read through.
LISTED_ROWS = 6
# Ranks whose buckets differ by less than this share of the step are the same for a reader.
ALIKE = 0.02
# Buckets besides work and transfers that have a column for each rank: always, or where some rank has any of it.
WAITS = {
    "imbalance": False,
    "straggler": True,
    "bubble": False,
    "input": True,
    "host": True,
    "checkpoint": False,
    "unseen": False,
    "other": True,
}


def explain_json(explanation: Explanation) -> str:
    """The whole explanation as JSON."""
    return msgspec.json.format(msgspec.json.encode(explanation)).decode()


def explain_text(explanation: Explanation, console: "Console") -> None:
    """Print what the run was, what it learned, its accounts and what stands out."""
    head = [
        ("Run", f"{explanation.name} · {run_line(explanation)}"),
        *([("Learned", learned_line(explanation))] if not explanation.traces else []),
        ("Speed", speed_line(explanation)),
    ]
    advice = [("Advice", advice_text(one)) for one in explanation.advice]
    faults = [(f"attempt {f.attempt}, rank {f.rank}, step {f.step}", f.what) for f in explanation.faults]
    tail = [("Yield", yield_line(explanation))] if not explanation.traces else []
    tail += [("Fault", f"{where}: {what}") for where, what in faults]
    tail += [("Finding", f"{finding.what} {finding.evidence}.") for finding in explanation.findings]
    tail += [("Note", note) for note in explanation.notes]
    parts = [labelled(lines) for lines in (head, advice) if lines]
    show([*parts, *tables(explanation), *([labelled(tail)] if tail else [])], console)


def tables(explanation: Explanation) -> list["Table"]:
    """The tables that the run has numbers for."""
    prediction, step, memory = explanation.prediction, explanation.step, explanation.memory
    found: list[Table] = []
    rows = step_rows(prediction.step if prediction is not None else None, step.account if step is not None else None)
    if rows:
        unit = time_unit(max(total(rows, "predicted"), total(rows, "measured")))
        found.append(comparison(step_title(step), "bucket", rows, unit, overlapped_rows(explanation)))
    if step is not None and ranks_differ(step):
        found.append(rank_table(step))
    found += [grid_table(grid) for grid in grids(explanation, LISTED_ROWS)]
    rows = memory_rows(memory.predicted, memory.measured)
    if rows:
        unit = memory_unit(max(total(rows, "predicted"), total(rows, "measured")))
        where = f"on rank {memory.rank}, the fullest" if memory.rank is not None else "not measured"
        found.append(comparison(f"Memory at the step's peak ({where})", "part", rows, unit))
    if explanation.life.account.total() > 0:
        found.append(run_table(explanation))
    return found


def grid_table(grid: Grid) -> "Table":
    """A table of what a step tells beyond its account."""
    from rich.text import Text

    table = new_table(grid.title, grid.words, grid.numbers)
    for column in table.columns[: len(grid.words)]:
        # Names that are long tell enough by their begin.
        column.no_wrap, column.overflow = True, "ellipsis"
    for row in grid.rows:
        # Names come from the program: never markup.
        table.add_row(*(Text(plain(cell)) for cell in row))
    return table


def step_title(step: MeasuredSteps | None) -> str:
    """What the step table's numbers are means of."""
    if step is None:
        return "Where a step's time goes (predicted; nothing measured)"
    return f"Where a step's time went (mean of {counted(len(step.ranks), 'rank')}, {steps_text(step.steps)})"


def comparison(title: str, kind: str, rows: Sequence[Row], unit: Unit, beside: Sequence[Row] = ()) -> "Table":
    """Predicted against measured, with share and difference, a line of totals, and below it what is not added.

    Where nothing was predicted, there is nothing to compare with.
    """
    planned = any(row.predicted is not None for row in rows)
    heads = ["predicted", "measured", "share", "difference"] if planned else ["measured", "share"]
    table = new_table(f"{title}, {unit.name}", [kind, "meaning"], heads)
    whole = total(rows, "measured")

    def add(row: Row, share: str, style: str = "") -> None:
        cells = [number(row.measured, unit), share]
        if planned:
            cells = [number(row.predicted, unit), *cells, gap(row, unit)]
        table.add_row(row.name, row.meaning, *cells, style=style)

    for row in rows:
        add(row, f"{row.measured / whole:z.1%}" if row.measured is not None and whole > 0 else "-")
    predicted = total(rows, "predicted") if rows[0].predicted is not None else None
    measured = whole if rows[0].measured is not None else None
    add(Row("total", "all of the above", predicted, measured), "100%" if measured else "-", "bold")
    for row in beside:
        add(row, "")
    return table


def overlapped_rows(explanation: Explanation) -> list[Row]:
    """Transfer hidden under compute, below the total: beside the account, never in it."""
    predicted = explanation.prediction.overlapped if explanation.prediction is not None else {}
    measured = explanation.step.overlapped if explanation.step is not None else {}
    return [
        Row(
            f"({name})",
            "hidden under compute, not in the total",
            predicted.get(name, 0.0) if explanation.prediction is not None else None,
            measured.get(name, 0.0) if explanation.step is not None else None,
        )
        for name in sorted(predicted.keys() | measured.keys())
    ]


def rank_table(step: MeasuredSteps) -> "Table":
    """Each rank's parts of the step, the ones that others wait for first where there are many."""
    waited_for = step.waited_for()
    unit = time_unit(step.wall_s)
    parts: dict[str, Callable[[StepAccount], float]] = {"compute": computing, "transfer": transferring}
    parts |= {
        name: attrgetter(name)
        for name in WAITS
        if WAITS[name] or any(getattr(account, name) for account in step.ranks.values())
    }
    table = new_table(f"Ranks, {unit.name} a step", ["rank"], [*parts, "others waited for it"])
    ranks = sorted(step.ranks)
    if len(ranks) > LISTED_RANKS:
        ranks = sorted(sorted(ranks, key=lambda rank: -waited_for.get(rank, 0.0))[:LISTED_RANKS])
        table.caption = f"the {LISTED_RANKS} of {len(step.ranks)} ranks that were waited for most"
    for rank in ranks:
        cells = [*(part(step.ranks[rank]) for part in parts.values()), waited_for.get(rank, 0.0)]
        table.add_row(str(rank), *(number(seconds, unit) for seconds in cells))
    return table


def run_table(explanation: Explanation) -> "Table":
    """Every paid device-second."""
    account = explanation.life.account
    table = new_table("Where the paid device-seconds went", ["part", "meaning"], ["device-seconds", "share"])
    paid = account.total()
    for name, meaning, seconds in run_rows(account):
        table.add_row(name, meaning, f"{seconds:,.1f}", f"{seconds / paid:.1%}")
    table.add_row("paid", "all ranks, all attempts", f"{paid:,.1f}", "100%", style="bold")
    return table


def new_table(title: str, words: Sequence[str], numbers: Sequence[str]) -> "Table":
    """An empty table: words to the left, numbers to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        # A title may be longer than its table is wide.
        title=Text(title, style="bold", no_wrap=True, overflow="ignore"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for word in words:
        table.add_column(word, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def ranks_differ(step: MeasuredSteps) -> bool:
    """Whether any bucket of the ranks lies further apart than a reader should ignore."""
    columns = zip(*([seconds for _, seconds in account.rows()] for account in step.ranks.values()), strict=True)
    return any(max(column) - min(column) > ALIKE * step.wall_s for column in columns)


def computing(account: StepAccount) -> float:
    """Seconds in which the rank worked."""
    return account.compute + account.recompute + account.optimizer


def transferring(account: StepAccount) -> float:
    """Seconds of exposed transfer of every purpose."""
    return sum(seconds for name, seconds in account.rows() if name.startswith("comm."))


def number(value: float | None, unit: Unit) -> str:
    """A value in the table's unit."""
    # Without the sign of what rounds to zero.
    return f"{value / unit.size:z,.1f}" if value is not None else "-"


def gap(row: Row, unit: Unit) -> str:
    """Predicted minus measured."""
    if row.predicted is None or row.measured is None:
        return "-"
    return f"{(row.predicted - row.measured) / unit.size:+,.1f}"
