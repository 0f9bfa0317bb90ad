"""Crossing the seam: the torch wing runs as a child process and leaves a run folder."""

import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from types import FrameType

from meshwright.record import RunFolder
from meshwright.spec import SettingError

# Exit code of a program that Ctrl-C ended.
INTERRUPTED = 130


def needs_torch(verb: str) -> None:
    """Raise SettingError where this Python has no torch."""
    if find_spec("torch") is None or find_spec("numpy") is None or find_spec("safetensors") is None:
        raise SettingError(
            f"meshwright {verb}", "PyTorch is not installed here", "pip install 'meshwright[train]', or meshwright plan"
        )


def run_attempt(folder: RunFolder, attempt: int, began_s: float) -> int:
    """Train one attempt on this node, in a child process, and return the exit code.

    Ctrl-C is passed on: ranks that train finish their step, save and end; before that there is nothing to save.
    """
    arguments = ["agent", str(folder.path), str(attempt), str(began_s)]
    # In a session of its own, so that the terminal's Ctrl-C comes to this process alone and is passed on once.
    child = subprocess.Popen([sys.executable, "-m", "meshwright", *arguments], start_new_session=True)
    interrupted = False

    def pass_on(_number: int, _frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        if any((folder.attempt(attempt) / "events").glob("rank-*.jsonl")):
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
    return INTERRUPTED if interrupted else code
