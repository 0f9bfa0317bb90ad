"""A rehearsal as one screen of text, and as JSON."""

from typing import TYPE_CHECKING

import msgspec

from meshwright.account import Account
from meshwright.record import Rehearsal
from meshwright.report.plan import MEMORY_WORDS, gb, new_table, seconds_text, titled
from meshwright.report.text import labelled, show

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

NOTES = (
    "Transfers took the time that they are predicted to take, and moved nothing. Waiting for other ranks is left out.",
    "Tokens are drawn evenly from the vocabulary; gathered values are the rank's own. The loss means nothing.",
)
# Below this, MB with one figure behind the point say little.
SMALL_BYTES = 1e6


def rehearsal_json(rehearsal: Rehearsal) -> str:
    """All of it as JSON."""
    return msgspec.json.format(msgspec.json.encode(rehearsal)).decode()


def rehearsal_text(rehearsal: Rehearsal, console: "Console") -> None:
    """Print what was predicted for the rank beside what it took."""
    what = f"rank {rehearsal.rank} of {rehearsal.layout.world_size:,}, {rehearsal.steps} steps on {rehearsal.device}"
    rows = [("Rehearsal", f"{rehearsal.model.name}: {what}"), ("Layout", rehearsal.layout.label())]
    notes = [("" if number else "Notes", line) for number, line in enumerate(NOTES)]
    show(
        [labelled(rows), memory_part(rehearsal), step_part(rehearsal), asked_part(rehearsal), labelled(notes)], console
    )


def memory_part(rehearsal: Rehearsal) -> "Table":
    """Every term that there is, and their sum."""
    table = new_table(["memory"], ["predicted", "rehearsed", "difference"])
    pairs = paired(rehearsal.predicted_memory, rehearsal.memory)
    for name, before, after in [*pairs, total(rehearsal.predicted_memory, rehearsal.memory)]:
        style = "bold" if name == "total" else ""
        table.add_row(MEMORY_WORDS.get(name, name), gb(before), gb(after), difference(before, after), style=style)
    return titled("At the step's peak", table)


def step_part(rehearsal: Rehearsal) -> "Table":
    """Every bucket that there is, their sum, and the steps that no profiler watched."""
    table = new_table(["step"], ["predicted", "rehearsed", "difference"])
    pairs = paired(rehearsal.predicted, rehearsal.measured)
    for name, before, after in [*pairs, total(rehearsal.predicted, rehearsal.measured)]:
        style = "bold" if name == "total" else ""
        cells = [time_text(before), time_text(after), difference(before, after)]
        table.add_row(f"{name} (exposed)" if name.startswith("comm.") else name, *cells, style=style)
    table.add_row("steps that were not profiled", "", time_text(rehearsal.step_s), "")
    for purpose, seconds in rehearsal.overlapped.items():
        if seconds:
            table.add_row(f"({purpose}, hidden)", "", time_text(seconds), "", style="dim")
    return titled("A step of this rank, without waiting for others", table)


def asked_part(rehearsal: Rehearsal) -> "Table":
    """The transfers of one step."""
    table = new_table(["transfers in a step"], ["ranks", "number", "bytes", "predicted"])
    for one in rehearsal.asked:
        table.add_row(
            one.kind.replace("_", " "),
            f"{one.ranks:,}",
            f"{one.count:,}",
            size_text(one.size_bytes),
            time_text(one.seconds),
        )
    return titled("Asked of other ranks" if rehearsal.asked else "Nothing was asked of other ranks", table)


def size_text(size_bytes: float) -> str:
    """Bytes in a unit that leaves them more than nothing."""
    if size_bytes >= SMALL_BYTES:
        return gb(size_bytes)
    return f"{size_bytes / 1e3:.3g} KB" if size_bytes >= 1e3 else f"{size_bytes:,.0f} B"


def paired(before: Account, after: Account) -> list[tuple[str, float, float]]:
    """(name, predicted, rehearsed) of all terms that either has, by the larger of both."""
    pairs = [(name, one, two) for (name, one), (_, two) in zip(before.rows(), after.rows(), strict=True) if one or two]
    return sorted(pairs, key=lambda pair: -max(pair[1:]))


def total(before: Account, after: Account) -> tuple[str, float, float]:
    """The sums."""
    return "total", before.total(), after.total()


def difference(before: float, after: float) -> str:
    """How much more was taken than predicted, in per cent; nothing where nothing was predicted."""
    return f"{100 * (after / before - 1):+.1f}%" if before > 0 and after >= 0 else ""


def time_text(seconds: float) -> str:
    """Seconds, of which there may be none, or less than none."""
    if not seconds:
        return "-"
    return f"-{seconds_text(-seconds)}" if seconds < 0 else seconds_text(seconds)
