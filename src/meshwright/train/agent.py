"""The torch side of the seam: starts and watches a node's ranks. A job goes in, a run folder comes out."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from meshwright.data import prepare
from meshwright.record import RunFolder
from meshwright.spec import SettingError
from meshwright.spec.decode import read_job
from meshwright.train.worker import CRASHED, REFUSED, Failure, no_machine, run_rank

# What usually sends a signal.
LIKELY: dict[int, str] = {signal.SIGKILL: " (often the system, out of memory)"}


def watch_ranks(run: str, attempt: int, began_s: float) -> int:
    """Train an attempt on this node's ranks; return the exit code."""
    folder = RunFolder(Path(run))
    job = read_job(folder.job, local=no_machine)
    try:
        # Before any rank waits for another: tokenising a large corpus takes longer than a collective may.
        prepare(job.data)
    except SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    return start_ranks(folder, attempt, job.layout.world_size, run_rank, (run, attempt, began_s))


def start_ranks(
    folder: RunFolder, attempt: int, ranks: int, work: Callable[..., None], arguments: tuple[object, ...]
) -> int:
    """Start so many ranks through torchrun's agent, each with work(*arguments), and wait; return the exit code."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=f"{folder.path.name}-{attempt}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        start_method="spawn",
        # SIGINT asks the ranks to finish their step and save; the agent only waits for them.
        signals_to_handle="SIGTERM",
    )
    # One host: nothing has to listen elsewhere, and its own name may resolve to an address that is not its.
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = loopback()
    try:
        elastic_launch(config, work)(*arguments)
    except ChildFailedError as error:
        return report_failure(folder, attempt, {rank: failure.exitcode for rank, failure in error.failures.items()})
    except SignalException as stopped:  # the ranks are gone by now
        return 128 + stopped.sigval
    return 0


def loopback() -> str:
    """Name of the interface that only this host sees."""
    return "lo" if sys.platform == "linux" else "lo0"


def report_failure(folder: RunFolder, attempt: int, exit_codes: dict[int, int]) -> int:
    """Say on standard error which rank failed first and why; return the exit code for it.

    A rank that was killed leaves no word, and its peers fail after it with broken connections: a signal that the
    agent did not send comes first.
    """
    words = [msgspec.json.decode(p.read_bytes(), type=Failure) for p in folder.attempt(attempt).glob("failure-*.json")]
    killed = {rank: -code for rank, code in exit_codes.items() if code < 0 and -code != signal.SIGTERM}
    if killed:
        rank, number = min(killed.items())
        print(f"rank {rank} was killed by {signal.Signals(number).name}{LIKELY.get(number, '')}", file=sys.stderr)
        return 128 + number
    if not words:
        if REFUSED in exit_codes.values():  # said by the rank itself, for want of room to leave word
            return REFUSED
        print(f"ranks ended without a word, with exit codes {exit_codes}", file=sys.stderr)
        return CRASHED
    first = min(words, key=lambda word: word.time_s)
    if not first.traceback:
        print(f"error: {first.line}", file=sys.stderr)
        return REFUSED
    print(f"rank {first.rank} failed:\n{first.traceback}rank {first.rank} failed: {first.line}", file=sys.stderr)
    return CRASHED
