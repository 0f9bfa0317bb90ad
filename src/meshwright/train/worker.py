"""One rank's process: join the job, run the loop, and leave word of how it ended."""

import gc
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch

from meshwright.data import prepare
from meshwright.parallel import start_distributed, stop_distributed, tell_all
from meshwright.record import RunFolder, replace_text
from meshwright.spec import Cluster, Job, SettingError
from meshwright.spec.decode import read_job
from meshwright.train.loop import train
from meshwright.train.setup import StopRequest

# How a rank's process ends, besides 0.
CRASHED = 1
REFUSED = 2
SHOW_CURSOR = "\x1b[?25h"
# A killed rank leaves no word and breaks its peers' connections. They wait this long before they end too, so that the
# agent, which looks ten times a second and names the first to end, sees the one that was killed.
AFTER_PEERS_S = 1.0


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a rank ended: one line; the traceback too, unless a setting was to blame."""

    rank: int
    time_s: float
    line: str
    traceback: str = ""


def run_rank(run: str, attempt: int, began_s: float) -> None:
    """A rank started by our own agent: train the run folder's job."""
    stop = StopRequest()
    stop.listen()
    folder = RunFolder(Path(run))
    with leave_word(folder, attempt):
        job = read_job(folder.job, local=no_machine)
        settle_process(job)
        device = start_distributed(job.cluster)
        train(job, folder, attempt, device, stop, began_s=began_s)
    stop_distributed()


@contextmanager
def leave_word(folder: RunFolder, attempt: int) -> Iterator[None]:
    """Around a rank's life: a failure ends the process and leaves word in the attempt's folder."""
    try:
        yield
    except BaseException as error:
        failure = failure_of(error)
        name = f"failure-{socket.gethostname()}-{os.getpid()}.json"
        try:
            replace_text(folder.attempt(attempt) / name, msgspec.json.encode(failure).decode())
        except OSError:  # a full disk may be what failed in the first place
            print(failure.traceback or f"error: {failure.line}", file=sys.stderr)
        if failure.traceback:
            time.sleep(AFTER_PEERS_S)
        end_now(CRASHED if failure.traceback else REFUSED)


def join_ranks(
    job: Job, begin: Callable[[], tuple[str, int]], forget: Callable[[str, int], None], began_s: float
) -> None:
    """A rank started by an external torchrun. `begin`, on rank 0, makes the run folder and its attempt, and `forget`
    removes them where the job is refused before its first step.

    torchrun watches the process here, so failures go to standard error and the exit code.
    """
    stop = StopRequest()
    stop.listen()
    begun: list[tuple[str, int]] = []

    def begin_here() -> tuple[str, int]:
        begun.append(begin())
        return begun[0]

    try:
        # Before any rank waits for another, for tokenising a large corpus takes longer than a collective may. Of ranks
        # that share a cache one does it, and the others wait for its lock as long as it takes.
        prepare(job.data)
        settle_process(job)
        device = start_distributed(job.cluster)
        run, attempt = tell_all(begin_here)
        train(job, RunFolder(Path(run)), attempt, device, stop, began_s=began_s)
    except BaseException as error:
        failure = failure_of(error)
        print(failure.traceback or f"error: {failure.line}", file=sys.stderr, flush=True)
        if begun and not failure.traceback:
            forget(*begun[0])
        end_now(CRASHED if failure.traceback else REFUSED)
    stop_distributed()


def failure_of(error: BaseException) -> Failure:
    """Word of an exception that is being handled."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else -1
    if isinstance(error, SettingError):
        return Failure(rank=rank, time_s=time.time(), line=str(error))
    line = f"{type(error).__name__}: {error}"
    return Failure(rank=rank, time_s=time.time(), line=line, traceback=traceback.format_exc())


def settle_process(job: Job) -> None:
    """Seed, share the cores, and keep the garbage collector from walking through what lives as long as the process."""
    torch.manual_seed(job.run.seed)
    if job.cluster.device.kind == "cpu" or job.layout.offload == "parameters":
        # More threads than cores only wait for each other; a single one, as torchrun has it, leaves cores idle.
        ranks = min(job.cluster.devices_per_node, job.layout.world_size)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    gc.collect()
    gc.freeze()


def no_machine(processes: int) -> Cluster:
    """A run folder's job is resolved: it never asks what machine it is on."""
    raise SettingError("cluster", f"is not resolved ({processes} processes)", "a run folder made by meshwright train")


def end_now(code: int) -> None:
    """End the process without waiting for peers: a collective in flight would keep an ordinary exit waiting."""
    if sys.stdout.isatty():
        sys.stdout.write(SHOW_CURSOR)  # a live display hides it and is not asked to clean up
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
