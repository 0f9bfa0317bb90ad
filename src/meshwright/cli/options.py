"""What several commands share: an option, and where their tables go."""

import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console

SET = click.option("--set", "settings", multiple=True, metavar="A.B=C", help="Change one key of the job.")


def console() -> "Console":
    """Where tables go: 100 columns where there is no terminal to ask."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 100, highlight=False)
