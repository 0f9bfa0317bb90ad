"""Crossing the seam: the torch wing runs as a child process and leaves a run folder."""

import ctypes
import logging
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from types import FrameType

from meshwright.launch.attempt import forget_untrained
from meshwright.record import RunFolder, Span, read_events
from meshwright.spec import SettingError

# Exit codes: of a setting that cannot be honoured, and of a program that Ctrl-C ended.
REFUSED = 2
INTERRUPTED = 130
# How the child ends where it was asked to stop: in good order, or told before there was anything to save.
STOPPED = (0, -signal.SIGTERM, 128 + signal.SIGTERM)

PR_SET_PDEATHSIG = 1


def needs_torch(verb: str) -> None:
    """Raise SettingError where this Python has no torch, or not what is installed with it."""
    names = {"torch": "PyTorch"} | {name: name for name in ("numpy", "safetensors", "tokenizers", "jinja2")}
    for module, name in names.items():
        if find_spec(module) is None:
            nearest = "pip install 'meshwright[train]', or meshwright plan"
            raise SettingError(f"meshwright {verb}", f"{name} is not installed here", nearest)


def run_attempt(folder: RunFolder, attempt: int, began_s: float) -> int:
    """Train one attempt on this node, in a child process, and return the exit code.

    Ctrl-C is passed on: ranks that train finish their step, save and end. Before the first step, in the evaluation that
    comes before it too, there is nothing to save.
    """
    arguments = ["agent", str(folder.path), str(attempt), str(began_s), str(os.getpid())]
    # In a session of its own, so that the terminal's Ctrl-C comes to this process alone and is passed on once.
    child = subprocess.Popen([sys.executable, "-m", "meshwright", *arguments], start_new_session=True)
    interrupted = False

    def pass_on(_number: int, _frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        if has_begun_steps(folder, attempt):
            print("\nstopping after this step, then saving; Ctrl-C again to stop at once", file=sys.stderr)
            os.killpg(child.pid, signal.SIGINT)
        else:
            print("stopped before the first step; nothing to save", file=sys.stderr)
            os.killpg(child.pid, signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    code = INTERRUPTED if interrupted and code in STOPPED else code
    if code in (REFUSED, INTERRUPTED):
        forget_untrained(folder, attempt)
    return code


def has_begun_steps(folder: RunFolder, attempt: int) -> bool:
    """Whether an attempt's ranks are past the evaluation that comes before their first step."""
    lines = (line for events in read_events(folder, attempt).values() for line in events)
    return any(isinstance(line, Span) and line.name == "evaluation" for line in lines)


def become_agent(parent: int) -> None:
    """Settle this process as the child of the command `parent`, which sends it what the user sends the command.

    Before anything slow is imported: a command that is killed meanwhile must not leave it behind.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        # If the command is killed, its agent is told, and the agent ends the ranks: nothing is left behind.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            sys.exit(128 + signal.SIGTERM)
    # torchrun logs each rank's failure in its own words; ours come once, from the agent's report.
    logging.disable()
