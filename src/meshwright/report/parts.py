"""The parts that a page is made of."""

import re
from collections.abc import Sequence
from html import escape

from meshwright.report.colours import COLOURS
from meshwright.report.details import Grid
from meshwright.report.text import plain


def text(words: object) -> str:
    """Text from anywhere, safe inside a tag and inside an attribute."""
    return escape(plain(str(words)), quote=True)


def prose(words: str) -> str:
    """The same of a sentence, the words of the account in it set apart."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text(words))


def table(head: str, lines: Sequence[str]) -> str:
    """A table that scrolls by itself where the screen is narrow."""
    return f'<div class="scroll"><table>{head}{"".join(lines)}</table></div>'


def word(name: str) -> str:
    """A cell with a word of the account, and its colour where it has one."""
    swatch = f'<span class="swatch" style="background:{COLOURS[name]}"></span>' if name in COLOURS else ""
    return f'<td class="word">{swatch}{text(name.replace("_", " "))}</td>'


def numbers(values: Sequence[float | None]) -> str:
    """Cells of numbers, a dash where there is none."""
    return "".join(f'<td class="n">{"-" if value is None else f"{value:z,.1f}"}</td>' for value in values)


def tile_row(cells: Sequence[tuple[str, str, str]]) -> str:
    """The headline numbers: name, value and what stands under it."""
    tiles = "".join(
        f'<div class="tile"><div class="name">{text(name)}</div><div class="value">{text(value)}</div>'
        f'<div class="beside">{text(beside)}</div></div>'
        for name, value, beside in cells
    )
    return f'<div class="tiles">{tiles}</div>' if cells else ""


def section(title: str, under: str, inner: str = "") -> str:
    """A card of the page."""
    line = f'<p class="soft">{text(under)}</p>' if under else ""
    return f"<section><h2>{text(title)}</h2>{line}{inner}</section>"


def chart(name: str) -> str:
    """Where a figure is drawn."""
    return f'<div class="chart" id="{name}"></div>'


def grid_section(grid: Grid) -> str:
    """A card with a table of words and numbers."""
    words = "".join(f"<th>{text(head)}</th>" for head in grid.words)
    numbers = "".join(f'<th class="n">{text(head)}</th>' for head in grid.numbers)
    head = f"<tr>{words}{numbers}</tr>"
    lines = [
        "<tr>"
        + "".join(f'<td class="name">{text(cell)}</td>' for cell in row[: len(grid.words)])
        + "".join(f'<td class="n">{text(cell)}</td>' for cell in row[len(grid.words) :])
        + "</tr>"
        for row in grid.rows
    ]
    return section(grid.title, grid.under, table(head, lines))
