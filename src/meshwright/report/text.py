"""What the screens of text share: a width, labels, and no spaces at the ends of lines."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from meshwright.record import PlannedPipeline

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

# Where no terminal says how wide it is.
PLAIN_WIDTH = 100


def show(parts: Sequence["RenderableType"], console: "Console") -> None:
    """Print the parts of a screen, an empty line between two of them."""
    if console.is_terminal:
        print_parts(parts, console, None)
        return
    # Tables are filled up with spaces to their width, which a log or an e-mail would keep.
    with console.capture() as captured:
        print_parts(parts, console, max(console.width, PLAIN_WIDTH))
    for line in captured.get().splitlines():
        console.out(line.rstrip(), highlight=False)


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
