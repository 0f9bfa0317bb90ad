"""The command line as a user runs it: real processes, real signals, tiny jobs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w

MESHWRIGHT = (sys.executable, "-m", "meshwright")
TIMEOUT_S = 90.0


def write_text(folder: Path) -> Path:
    """A small corpus."""
    text = folder / "text"
    text.mkdir(parents=True, exist_ok=True)
    for number in range(40):
        words = " ".join(f"word{(number * 7 + i * i) % 97}" for i in range(120))
        (text / f"{number}.txt").write_text(words)
    return text


def write_job(folder: Path, *, ranks: int = 2, **sections: dict[str, Any]) -> Path:
    """A job file for a tiny model, its data and its run folder under `folder`."""
    table: dict[str, Any] = {
        "run": {"name": "tiny", "folder": str(folder / "runs"), "steps": 6},
        "model": {"layers": 1, "d_model": 16, "heads": 2, "feed_forward": 32, "vocabulary": 257},
        "data": {"path": str(write_text(folder)), "cache": str(folder / "tokens"), "sequence": 16, "global_batch": 4},
        "layout": {"shard": "all"},
        "cluster": {"processes": ranks},
        "evaluation": {"sequences": 2},
        "trace": {"every_steps": 0},
    }
    for name, section in sections.items():
        table[name] = table[name] | section if name in table else section
    path = folder / "job.toml"
    path.write_text(tomli_w.dumps(table))
    return path


def environment(**more: str) -> dict[str, str]:
    """This process's environment without what a launcher or a test put there, one thread an operator."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID")}
    return kept | {"CUDA_VISIBLE_DEVICES": ""} | more


def run(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    """`meshwright ARGUMENTS`, to its end."""
    command = [*MESHWRIGHT, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S, env=environment(**more)
    )


@contextmanager
def running(*arguments: object, **more: str) -> Iterator[subprocess.Popen[str]]:
    """`meshwright ARGUMENTS` in a process group of its own, as a shell would start it."""
    command = [*MESHWRIGHT, *map(str, arguments)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment(**more),
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=TIMEOUT_S)


def wait_until(happens: Callable[[], bool], process: subprocess.Popen[str], within_s: float = TIMEOUT_S) -> None:
    """Wait for something to happen while a process runs; fail if it ends first."""
    until = time.monotonic() + within_s
    while not happens():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)


def lines_in(path: Path) -> int:
    """Lines of a file that may not be there yet."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def processes_of(folder: Path) -> dict[int, str]:
    """Processes that know of a folder: in their arguments or, as ranks do, in their environment."""
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes() + b"\0" + (entry / "environ").read_bytes()
            except OSError:
                continue
            if str(folder).encode() in words:
                found[int(entry.name)] = words.split(b"\0\0")[0].replace(b"\0", b" ").decode(errors="replace")
    return found


def nothing_left(folder: Path, within_s: float = 8.0) -> None:
    """Fail if a process that knows of `folder` outlives its command by `within_s`."""
    until = time.monotonic() + within_s
    while (left := processes_of(folder)) and time.monotonic() < until:
        time.sleep(0.1)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert not left
