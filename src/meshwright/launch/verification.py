"""`meshwright verify` up to the seam: a small job of the same kind, and the process that runs it twice."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import msgspec

from meshwright.launch.attempt import begin_attempt
from meshwright.launch.process import INTERRUPTED
from meshwright.launch.shrink import find_unverified, shrink_job, write_text
from meshwright.record.verification import Trial, read_trial
from meshwright.spec import Cluster, Job, Precision, check_trained

# 39 s for 8 processes on 2 cores, 10 s for 2; most of it each process's start.
DURATION = "some 5 s for each of them on two cores"


class VerificationEnded(Exception):
    """The process that verifies ended without a result; `code` is its exit code, and it said why itself."""

    def __init__(self, code: int) -> None:
        self.code = code
        super().__init__(code)


def run_trials(job: Job, *, local: Callable[[int], Cluster]) -> list[Trial]:
    """Hold the job's layout against one process, in fp32, and on GPUs in the job's own precision too.

    Raises SettingError where the layout cannot be made small, and VerificationEnded where a run did not end well.
    """
    # Before the job is made small: what it cannot be made into is said of numbers that nobody wrote.
    check_trained(job)
    trials = [run_trial(job, "fp32", local)]
    if job.layout.precision != "fp32" and trials[0].job.cluster.device.kind == "cuda":
        trials.append(run_trial(job, job.layout.precision, local))
    return trials


def run_trial(job: Job, precision: Precision, local: Callable[[int], Cluster]) -> Trial:
    """One precision, in a folder that is removed afterwards."""
    with telling_of_interrupts(), tempfile.TemporaryDirectory(prefix="meshwright-verify-") as name:
        folder = Path(name)
        job = msgspec.structs.replace(job, layout=msgspec.structs.replace(job.layout, precision=precision))
        small = shrink_job(job, folder, local=local)
        ranks = small.layout.world_size
        print(f"verifying in {precision}: one process, then {ranks} ranks; {DURATION}", file=sys.stderr, flush=True)
        write_text(folder)
        run, attempt = begin_attempt(None, small, warn=False)
        arguments = ["verify-agent", str(run.path), str(attempt), str(os.getpid())]
        code = wait_for(subprocess.Popen([sys.executable, "-m", "meshwright", *arguments], start_new_session=True))
        if code:
            raise VerificationEnded(code)
        return msgspec.structs.replace(read_trial(run), unverified=find_unverified(job, small))


def wait_for(child: subprocess.Popen[bytes]) -> int:
    """The child's exit code. Ctrl-C ends it and its ranks at once, and raises: there is nothing to save."""
    interrupted = False

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        os.killpg(child.pid, signal.SIGTERM)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if interrupted:
        raise KeyboardInterrupt
    return code


@contextmanager
def telling_of_interrupts() -> Generator[None]:
    """Say what an interrupt means, wherever it comes."""
    try:
        yield
    except KeyboardInterrupt:
        print("\nstopped; nothing was compared", file=sys.stderr)
        raise VerificationEnded(INTERRUPTED) from None
