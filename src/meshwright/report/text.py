"""What the screens of text share: a width, labels, and no spaces at the ends of lines."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from meshwright.record import PlannedPipeline

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

# Where no terminal says how wide it is.
PLAIN_WIDTH = 100
# Columns between two tables.
GAP = 3


def show(parts: Sequence["RenderableType"], console: "Console") -> None:
    """Print the parts of a screen, an empty line between two of them."""
    if console.is_terminal:
        print_parts(parts, console, None)
        return
    # Tables are filled up with spaces to their width, which a log or an e-mail would keep.
    with console.capture() as captured:
        print_parts(parts, console, screen_width(console))
    for line in captured.get().splitlines():
        console.out(line.rstrip(), highlight=False)


def screen_width(console: "Console") -> int:
    """Columns that a screen of text may fill."""
    return console.width if console.is_terminal else max(console.width, PLAIN_WIDTH)


def beside(left: "Table", right: "Table", console: "Console") -> "Table":
    """Two tables next to each other; where both do not fit in the width, one below the other."""
    from rich.table import Table

    grid = Table.grid(padding=(0, GAP))
    options = console.options.update_width(screen_width(console))
    widths = [console.measure(part, options=options).maximum for part in (left, right)]
    if sum(widths) + GAP <= options.max_width:
        grid.add_row(left, right)
        return grid
    for part in (left, "", right):
        grid.add_row(part)
    return grid


def print_parts(parts: Sequence["RenderableType"], console: "Console", width: int | None) -> None:
    """Each part, and an empty line before all but the first."""
    for number, part in enumerate(parts):
        if number:
            console.print("")
        console.print(part, width=width)


def labelled(lines: Sequence[tuple[str, str]]) -> "Table":
    """Lines with a word in front, wrapped beside it. The text may come from elsewhere, so it is never markup."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    for label, text in lines:
        grid.add_row(Text(label, style="bold"), Text(plain(text)))
    return grid


def plain(text: str) -> str:
    """One line of text from elsewhere without characters that steer a terminal or turn the reading direction."""
    return "".join(c if c.isprintable() else " " for c in text)


def blocks_held(planned: PlannedPipeline) -> str:
    """The schedule with the blocks of each rank: "1f1b; blocks on each rank: 9, 9, 8, 6"."""
    stages = list(zip(planned.stage_layers, planned.stage_ranks, strict=True))
    held = ["+".join(str(layers) for layers, rank in stages if rank == place) for place in range(len(planned.ranks))]
    return f"{planned.schedule}; blocks on each rank: {', '.join(held)}"
