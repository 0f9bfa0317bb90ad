"""`meshwright data`: what text becomes."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from meshwright.cli.machine import read
from meshwright.cli.options import SET

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import ModuleType


@click.group()
def data() -> None:
    """Tokenise a JOB's text, and look at what came of it."""


@data.command("prepare")
@click.argument("job", type=click.Path(path_type=Path))
@click.option("--workers", type=click.IntRange(1), help="Processes that tokenise.  [default: one a core]")
@SET
def data_prepare(job: Path, workers: int | None, settings: tuple[str, ...]) -> None:
    """Tokenise the text of a JOB. After an interruption the same command goes on."""
    show = data_module("data prepare")
    print_lines(show.prepared_lines(read(job, settings), workers))


@data.command("show")
@click.argument("job", type=click.Path(path_type=Path))
@click.option("--step", type=int, default=0, show_default=True, help="Step, from 0.")
@click.option("--index", type=int, default=0, show_default=True, help="Sample of the step's global batch, from 0.")
@SET
def data_show(job: Path, step: int, index: int, settings: tuple[str, ...]) -> None:
    """Print one sample of a JOB as text."""
    show = data_module("data show")
    print_lines(show.sample_lines(read(job, settings), step, index))


@data.command("stats")
@click.argument("job", type=click.Path(path_type=Path))
@SET
def data_stats(job: Path, settings: tuple[str, ...]) -> None:
    """Print how much data a JOB has, and how often it sees it."""
    show = data_module("data stats")
    print_lines(show.stats_lines(read(job, settings)))


def data_module(command: str) -> "ModuleType":
    """What looks at data, once it is sure that it can be loaded."""
    from meshwright import launch

    launch.needs_torch(command)
    from meshwright.data import show

    return show


def print_lines(lines: "Iterable[str]") -> None:
    """Each as soon as it is known."""
    for line in lines:
        click.echo(line)
