"""Crossing the seam: the torch wing runs as a child process and leaves a run folder."""

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from types import FrameType

from meshwright.launch.attempt import forget_untrained
from meshwright.record import Ended, RunFolder, Span, read_events, write_cut_short
from meshwright.spec import SettingError

# Exit codes: of a setting that cannot be honoured, and of a program that Ctrl-C ended.
REFUSED = 2
INTERRUPTED = 130
# How the child ends where it was asked to stop: in good order, or told before there was anything to save.
STOPPED = (0, -signal.SIGTERM, 128 + signal.SIGTERM)
# Signals so close to the first are the same wish: timeout sends its own to the command, and to its group again.
SAME_REQUEST_S = 0.2

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

    Ctrl-C is passed on: ranks that train finish their step, save and end; a second one ends them at once. Before the
    first step, in the evaluation that comes before it too, there is nothing to save.
    """
    arguments = ["agent", str(folder.path), str(attempt), str(began_s), str(os.getpid())]
    # In a session of its own, so that the terminal's Ctrl-C comes to this process alone and is passed on once.
    child = subprocess.Popen([sys.executable, "-m", "meshwright", *arguments], start_new_session=True)
    asked_s: list[float] = []

    def pass_on(_number: int, _frame: FrameType | None) -> None:
        asked_s.append(time.monotonic())
        if len(asked_s) > 1 and asked_s[-1] - asked_s[0] < SAME_REQUEST_S:
            return
        if not has_begun_steps(folder, attempt):
            print("stopped before the first step; nothing to save", file=sys.stderr)
            os.killpg(child.pid, signal.SIGTERM)
        elif len(asked_s) == 1:
            print("\nstopping after this step, then saving; Ctrl-C again to stop at once", file=sys.stderr)
            os.killpg(child.pid, signal.SIGINT)
        else:
            print("stopped at once", file=sys.stderr)
            os.killpg(child.pid, signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    code = INTERRUPTED if asked_s and code in STOPPED else code
    if code in (REFUSED, INTERRUPTED):
        forget_untrained(folder, attempt)
    if code not in (0, REFUSED) and folder.path.is_dir() and not ended_in_order(folder, attempt):
        write_cut_short(folder, attempt, code)
        print(what_is_saved(folder), file=sys.stderr)
    return code


def ended_in_order(folder: RunFolder, attempt: int) -> bool:
    """Whether a rank saw the attempt to its end, and said what comes next."""
    return any(isinstance(line, Ended) for events in read_events(folder, attempt).values() for line in events)


def what_is_saved(folder: RunFolder) -> str:
    """What a run that was cut short goes on from, and what to type for it."""
    step = max(folder.saved_steps(), default=0)
    word = f"nothing saved since step {step}; to go on from there" if step else "nothing saved yet; to begin again"
    return f"{word}: meshwright train --resume {folder.path}"


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
