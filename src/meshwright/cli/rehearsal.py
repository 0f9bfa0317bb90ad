"""`meshwright rehearse`: one rank of a layout on one device, before the others are rented."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from meshwright.cli.machine import local, read
from meshwright.cli.options import SET, console

if TYPE_CHECKING:
    from meshwright.spec import Job


@click.command()
@click.argument("job", type=click.Path(path_type=Path))
@click.option("--rank", type=int, help="Which rank of the layout.  [default: the one that needs most memory]")
@click.option("--steps", type=int, default=8, show_default=True, help="How many steps; one of them is profiled.")
@click.option("--out", type=click.Path(path_type=Path), help="The file for the plan.  [default: RUNS/NAME-rank-R.json]")
@click.option("--json", "as_json", is_flag=True, help="Print the rehearsal as JSON.")
@SET
def rehearse(
    job: Path, rank: int | None, steps: int, out: Path | None, as_json: bool, settings: tuple[str, ...]
) -> None:
    """Run one rank of a JOB's layout, of any number of ranks, on one device: its real memory and compute.

    Nothing is sent. Transfers take the time that they are predicted to take, and the tokens are invented.
    """
    from meshwright import launch
    from meshwright.report.rehearsal import rehearsal_json, rehearsal_text

    launch.needs_torch("rehearse")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    wanted = read(job, settings)
    launch.check_rehearsal_file(out or default_file(wanted, 0))
    try:
        rehearsal = launch.run_rehearsal(wanted, rank, steps, local=local)
    except launch.RehearsalEnded as ended:
        sys.exit(ended.code)
    path = out or default_file(wanted, rehearsal.rank)
    launch.write_rehearsal(rehearsal, path)
    if as_json:
        click.echo(rehearsal_json(rehearsal))
        return
    rehearsal_text(rehearsal, console())
    changed = "".join(f" --set {setting}" for setting in settings)
    click.echo(f"\nwritten: {path}; the plan with it: meshwright plan {job}{changed} --rehearsed {path}")


def default_file(job: "Job", rank: int) -> Path:
    """Where a rank's rehearsal goes if nobody says."""
    return Path(job.run.folder) / f"{job.run.name}-rank-{rank}.json"


@click.command(hidden=True)
@click.argument("run")
@click.argument("attempt", type=int)
@click.argument("parent", type=int)
def rehearse_agent(run: str, attempt: int, parent: int) -> None:
    """The child process of `rehearse`: is the rank."""
    from meshwright import launch

    launch.become_agent(parent)
    from meshwright.train.rehearsal import rehearse_run

    sys.exit(rehearse_run(run, attempt))
