"""`meshwright calibrate`: a machine's own figures in the place of the built-in ones."""

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from meshwright.cli.machine import local, under_torchrun
from meshwright.spec.errors import SettingError

if TYPE_CHECKING:
    from meshwright.record.calibration import Request

# As many as examples/first-run.toml has.
PROCESSES = 2
MOST_PROCESSES = 1024


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default="cluster.toml", show_default=True, help="The new cluster file."
)
@click.option("--processes", type=int, help="CPU processes to measure with, where there is no GPU.  [default: 2]")
@click.option("--quick", is_flag=True, help="A few sizes in some seconds: less sure of all that is between them.")
def calibrate(out: Path, processes: int | None, quick: bool) -> None:
    """Measure this machine, in 3 minutes at most, and write a cluster file for plans and jobs.

    Under torchrun on every node of a cluster: the links between nodes too.
    """
    from meshwright import launch
    from meshwright.plan.plan import UNSTEADY_NOTE

    began_s = time.monotonic()
    if processes is not None and not 1 <= processes <= MOST_PROCESSES:
        near = 1 if processes < 1 else MOST_PROCESSES
        raise SettingError(
            f"--processes {processes}", f"must lie between 1 and {MOST_PROCESSES}", f"--processes {near}"
        )
    launch.needs_torch("calibrate")
    launch.check_out(out)
    # The compiler and the profiler would write lines between ours.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    if under_torchrun():
        request = request_under_torchrun(processes, quick)
        from meshwright.calibrate.agent import join_calibration

        calibration = join_calibration(request)
        if calibration is None:
            return
    else:
        request = request_here(processes, quick)
        click.echo(f"calibrating {request.cluster.label()}", err=True)
        try:
            calibration = launch.run_calibration(request)
        except launch.CalibrationEnded as ended:
            sys.exit(ended.code)
    cluster = launch.write_cluster(out, request, calibration)
    if cluster.measured is not None and not cluster.measured.is_steady:
        click.echo(f"warning: {UNSTEADY_NOTE}", err=True)
    for line in calibration.missing:
        click.echo(f"not measured: {line}", err=True)
    click.echo(f"measured {cluster.label()} in {time.monotonic() - began_s:.0f} s; written: {out}")


def request_here(processes: int | None, quick: bool) -> "Request":
    """All GPUs of this machine, or processes that share its cores."""
    from meshwright.record.calibration import Request

    cluster = local(processes or PROCESSES)
    if processes is not None and cluster.device.kind != "cpu":
        reason = f"counts CPU processes, and this machine has {cluster.label()}"
        raise SettingError(f"--processes {processes}", reason, "CUDA_VISIBLE_DEVICES= to measure its processor")
    return Request(cluster=cluster, quick=quick)


def request_under_torchrun(processes: int | None, quick: bool) -> "Request":
    """The ranks that torchrun started, on as many nodes as it says."""
    import msgspec

    from meshwright.record.calibration import Request

    ranks, per_node = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if processes is not None:
        raise SettingError(f"--processes {processes}", "torchrun started the processes", "torchrun --nproc-per-node")
    cluster = local(per_node)
    if ranks % per_node or (cluster.device.kind != "cpu" and cluster.devices < per_node):
        reason = f"torchrun started {ranks}, {per_node} of them here"
        raise SettingError(f"cluster of {cluster.label()}", reason, f"torchrun --nproc-per-node {cluster.devices}")
    cluster = msgspec.structs.replace(cluster, nodes=ranks // per_node, devices_per_node=per_node)
    return Request(cluster=cluster, quick=quick)


@click.command(hidden=True)
@click.argument("run")
@click.argument("parent", type=int)
def calibrate_agent(run: str, parent: int) -> None:
    """The child process of `calibrate`: starts the ranks that measure."""
    from meshwright import launch

    launch.become_agent(parent)
    from meshwright.calibrate.agent import calibrate_folder

    sys.exit(calibrate_folder(run))
