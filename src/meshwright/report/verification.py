"""A verification, for people."""

import msgspec
from rich.console import Console
from rich.table import Table

from meshwright.explain.verification import Row, Verdict
from meshwright.record.verification import Trial


def verification_json(judged: list[tuple[Trial, Verdict]]) -> str:
    """A list, one entry a precision; nan and inf, for which JSON has no word, are null."""
    entries = [{"trial": trial, "verdict": verdict} for trial, verdict in judged]
    return msgspec.json.format(msgspec.json.encode(entries)).decode()


def verification_text(trial: Trial, verdict: Verdict, console: Console) -> None:
    """Print what was compared, each gradient, and the verdict."""
    job = trial.job
    small = f"{job.model.layers} layers of width {job.model.d_model}, {len(trial.reference.losses)} steps of SGD"
    layout = f"{job.layout.label()}, {job.layout.precision}"
    console.print(f"The job, shrunk to: {layout}, against one process ({job.model.family}, {small})")
    for setting in trial.unverified:
        console.print(f"Not verified: {setting}", markup=False)
    console.print(build_table("compared", list(verdict.rows)))
    console.print(build_table("gradient", list(verdict.tensors)))
    if verdict.cause is None:
        console.print(f"The layout equals one process: every difference is within {largest_bound(verdict):.0e}.")
        return
    cause = verdict.cause
    factor = "" if cause.factor is None else f", by a factor of {cause.factor:.4g}"
    console.print(f"The layout does not equal one process. It differs first at {cause.module}{factor}:")
    console.print(f"{cause.likely}.")


def build_table(head: str, rows: list[Row]) -> Table:
    """Differences beside their bounds; those beyond are marked."""
    table = Table(box=None, pad_edge=False)
    table.add_column(head)
    table.add_column("difference", justify="right")
    table.add_column("bound", justify="right")
    table.add_column("")
    for row in rows:
        mark = "" if row.agrees else "  differs"
        table.add_row(row.what, f"{row.difference:.1e}", f"{row.bound:.0e}", f"{row.where}{mark}")
    return table


def largest_bound(verdict: Verdict) -> float:
    """Of all rows."""
    return max(row.bound for row in verdict.rows)
