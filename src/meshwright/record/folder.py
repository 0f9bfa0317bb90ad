"""The run folder: where each thing lies, one writer, one reader."""

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar, cast

import msgspec

from meshwright.record.events import Evaluation, Event, Metrics, Prediction
from meshwright.record.program import Program
from meshwright.spec import SettingError

T = TypeVar("T")
L = TypeVar("L", Metrics, Evaluation)

# Runs that an error names.
SHOWN_RUNS = 3
# The file that makes a checkpoint complete.
MANIFEST = "manifest.json"


class RunFolder:
    """Paths of one run. Creates nothing by itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.job = path / "job.toml"
        # In place of a job, where another trainer recorded the run.
        self.program = path / "program.json"
        # Of a run in which one rank rehearses: what it is asked, and what it found beside its events.
        self.task = path / "task.json"
        self.rehearsed = path / "rehearsed.json"
        self.metrics = path / "metrics.jsonl"
        self.attempts = path / "attempts"
        self.checkpoints = path / "checkpoints"
        self.report = path / "report.html"

    def attempt(self, number: int) -> Path:
        """Folder of one start of the job."""
        return self.attempts / str(number)

    def plan(self, attempt: int) -> Path:
        """The attempt's layout and predicted accounts."""
        return self.attempt(attempt) / "plan.json"

    def cut_short(self, attempt: int) -> Path:
        """There once the launcher has seen an attempt end that no rank saw to its end: its exit code."""
        return self.attempt(attempt) / "cut-short.txt"

    def events(self, attempt: int, rank: int) -> Path:
        """The attempt's events of one rank."""
        return self.attempt(attempt) / "events" / f"rank-{rank}.jsonl"

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint after `step` steps."""
        return self.checkpoints / f"step-{step}"

    def saved_steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first: those that have their manifest, which is written last."""
        names = [path.parent.name.removeprefix("step-") for path in self.checkpoints.glob(f"step-*/{MANIFEST}")]
        return sorted(int(name) for name in names if name.isdigit())

    def attempt_numbers(self) -> list[int]:
        """Attempts so far, oldest first."""
        if not self.attempts.is_dir():
            return []
        return sorted(int(p.name) for p in self.attempts.iterdir() if p.name.isdecimal())

    def ranks(self, attempt: int) -> list[int]:
        """Ranks that wrote events in an attempt."""
        names = [path.stem.removeprefix("rank-") for path in self.attempt(attempt).glob("events/rank-*.jsonl")]
        return sorted(int(name) for name in names if name.isdecimal())


def create_run(path: Path, job_toml: str) -> RunFolder:
    """Make a new run folder with its job. Raises SettingError if one is there already: a run is never overwritten."""
    folder = RunFolder(path)
    try:
        path.mkdir(parents=True)
        replace_text(folder.job, job_toml)
    except FileExistsError:
        raise SettingError(
            f"run folder {path}",
            "exists already, and a run is never overwritten",
            f"--resume {path}, or --set run.name={free_name(path)}",
        ) from None
    except OSError as error:
        # An empty folder left behind would make the next try fail for another reason.
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        raise SettingError(
            f"run folder {path}", f"cannot be made ({error.strerror})", "--set run.folder=runs"
        ) from None
    return folder


def free_name(path: Path) -> str:
    """A run name beside `path` that is not taken: name-2, name-3, ..."""
    number = 2
    while path.with_name(f"{path.name}-{number}").exists():
        number += 1
    return f"{path.name}-{number}"


def open_run(path: Path) -> RunFolder:
    """An existing run folder. Raises SettingError where `path` is none."""
    folder = RunFolder(path)
    if not folder.job.is_file() and not folder.program.is_file():
        reason = "holds no job.toml and no program.json" if path.exists() else "does not exist"
        raise SettingError(f"run folder {path}", reason, nearby_runs(path))
    return folder


def nearby_runs(path: Path) -> str:
    """Runs to suggest: those in a folder that is none itself, or else beside it; one alone where it is spelt alike."""
    inside, beside = runs_in(path), runs_in(path.parent)
    near = get_close_matches(path.name, beside, n=1) if not inside else []
    found = [path / name for name in inside] or [path.parent / name for name in near or beside]
    return ", ".join(str(run) for run in found[:SHOWN_RUNS]) or "a folder that meshwright train made"


def runs_in(folder: Path) -> list[str]:
    """Names of the runs in a folder. One in which somebody keeps a job file of their own has no attempts."""
    runs = (RunFolder(path.parent) for path in folder.glob("*/attempts"))
    return sorted(run.path.name for run in runs if run.job.is_file() or run.program.is_file())


def start_attempt(folder: RunFolder, prediction: Prediction | None) -> int:
    """Make the next attempt's folder with its plan, if there is one, and return its number."""
    number = max(folder.attempt_numbers(), default=-1) + 1
    (folder.attempt(number) / "events").mkdir(parents=True)
    if prediction is not None:
        replace_text(folder.plan(number), json_text(prediction))
    return number


def write_program(folder: RunFolder, program: Program) -> None:
    """Say, or say anew, which program the run is of."""
    folder.path.mkdir(parents=True, exist_ok=True)
    replace_text(folder.program, json_text(program))


def read_program(folder: RunFolder) -> Program | None:
    """The program that recorded the run; None where it is a job of ours, or the file cannot be read."""
    try:
        return msgspec.json.decode(folder.program.read_bytes(), type=Program)
    except (OSError, msgspec.DecodeError, RecursionError):
        return None


def json_text(value: msgspec.Struct) -> str:
    """As a file for people to read too."""
    return msgspec.json.format(msgspec.json.encode(value)).decode() + "\n"


def write_cut_short(folder: RunFolder, attempt: int, code: int) -> None:
    """Leave word that an attempt is over although no rank says so; a full disk may be why."""
    with suppress(OSError):
        replace_text(folder.cut_short(attempt), f"{code}\n")


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: under another name first, then renamed into place."""
    # A path that ends in no name, as a folder's may, is refused by the renaming.
    partial = path.parent / f".{path.name}.{os.getpid()}"
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


class LineWriter:
    """Appends JSON lines to one file, each in one write, so that a reader never sees two lines mixed.

    A full disk does not stop a run: lines wait in memory and go out, in order, when there is room again.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._waiting = b"" if _ends_with_newline(path) else b"\n"

    def append(self, line: msgspec.Struct) -> None:
        """Append one line; where the disk is full, keep it for the next call."""
        self._waiting += msgspec.json.encode(line) + b"\n"
        self._send()

    def _send(self) -> None:
        try:
            while self._waiting:
                written = os.write(self._file, self._waiting)
                self._waiting = self._waiting[written:]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise

    def close(self) -> None:
        """Close the file, after a last try to write what waits for room."""
        self._send()
        os.close(self._file)


def _ends_with_newline(path: Path) -> bool:
    """Whether a new line can follow at once: a writer that was killed may have left half a line."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def read_lines(path: Path, kind: type[T]) -> Iterator[T]:
    """The lines of a file as `kind`, while it may still be written: a line that is not whole is left out.

    Lines of kinds that this version does not know are left out too, so that a newer run stays readable.
    """
    if not path.is_file():
        return
    decoder = msgspec.json.Decoder(kind)
    with path.open("rb") as file:
        for line in file:
            try:
                yield decoder.decode(line)
            except (msgspec.DecodeError, RecursionError):
                continue


def read_metrics(folder: RunFolder) -> tuple[list[Metrics], list[Evaluation]]:
    """Training steps and held-out losses of the run as it stands, in order of step.

    Where an attempt resumed from an earlier step, what its forerunners did from there on is no part of the run.
    """
    return _standing(list(read_lines(folder.metrics, Metrics))), _standing(list(read_lines(folder.metrics, Evaluation)))


def _standing(lines: list[L]) -> list[L]:
    """The lines that no later attempt did again, one a step."""
    first: dict[int, int] = {}
    for line in lines:
        first[line.attempt] = min(line.step, first.get(line.attempt, line.step))
    kept = {
        line.step: line
        for line in lines
        if all(line.step < start for attempt, start in first.items() if attempt > line.attempt)
    }
    return [kept[step] for step in sorted(kept)]


def read_events(folder: RunFolder, attempt: int) -> dict[int, list[Event]]:
    """Events of each rank of an attempt."""
    kind = cast(type[Event], Event)
    return {rank: list(read_lines(folder.events(attempt, rank), kind)) for rank in folder.ranks(attempt)}


def read_prediction(folder: RunFolder, attempt: int) -> Prediction | None:
    """What was predicted for an attempt, if its plan is there and can be read."""
    try:
        return msgspec.json.decode(folder.plan(attempt).read_bytes(), type=Prediction)
    except (OSError, msgspec.DecodeError, RecursionError):
        return None
