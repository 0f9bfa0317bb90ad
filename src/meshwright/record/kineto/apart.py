"""Reads a trace in a process of its own: a request on standard input, a reply on standard output. Loads no torch."""

import subprocess
import sys
from pathlib import Path
from typing import cast

import msgspec

from meshwright.account import Purpose
from meshwright.record.events import Step
from meshwright.record.kineto.flops import Count, count_flops

# Reading must not take a core from the training beside it, nor must the loading of what reads.
NICENESS = 19
# A trace of a step that is not read by then never will be.
TIMEOUT_S = 600
START = (
    "import os; os.nice({niceness}); import sys; sys.path.append({root!r}); "
    "from meshwright.record.kineto.apart import serve; serve()"
)


class ReadStep(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Read the trace at `path`, whose last step is `step`; see measure_step for the rest."""

    path: str
    step: int
    rank: int
    host: str
    purposes: dict[str, Purpose]
    useful_s: float


class CountFlops(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Count the FLOPs in the trace at `path`, of one step, with shapes."""

    path: str


Request = ReadStep | CountFlops


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for, or in one line why there is none."""

    step: Step | None = None
    count: Count | None = None
    failure: str = ""


def read_apart(request: Request) -> Reply:
    """Read a trace in a child process of low priority, and wait for it. Never raises."""
    root = str(Path(__file__).parents[3])
    try:
        # -P: not from the folder that the training was started in, where a module may have the name of one of ours.
        finished = subprocess.run(
            [sys.executable, "-P", "-c", START.format(niceness=NICENESS, root=root)],
            input=msgspec.json.encode(request),
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return Reply(failure=f"the process that reads traces did not finish: {type(error).__name__}: {error}")
    try:
        return msgspec.json.decode(finished.stdout, type=Reply)
    except msgspec.DecodeError:
        lines = finished.stderr.decode(errors="replace").split("\n")
        said = next((line for line in reversed(lines) if line.strip()), "it said nothing")
        return Reply(failure=f"the process that reads traces ended with code {finished.returncode}: {said}")


def serve() -> None:
    """The child: answer one request."""
    request: Request = msgspec.json.decode(sys.stdin.buffer.read(), type=cast(type[Request], Request))
    sys.stdout.buffer.write(msgspec.json.encode(answer(request)))


def answer(request: Request) -> Reply:
    """Read the trace; whatever is wrong with the trace is told, not raised."""
    # Not at the top: what this file offers a trainer is not the reading itself, which takes longer to load.
    from meshwright.record.kineto import measure_step, read_trace

    try:
        if isinstance(request, CountFlops):
            return Reply(count=count_flops(Path(request.path)))
        step = measure_step(
            read_trace(Path(request.path)),
            step=request.step,
            rank=request.rank,
            host=request.host,
            purposes=request.purposes,
            useful_s=request.useful_s,
        )
    except (OSError, LookupError, ValueError, TypeError, RecursionError, MemoryError) as error:
        return Reply(failure=f"{type(error).__name__}: {error}")
    return Reply(step=step)
