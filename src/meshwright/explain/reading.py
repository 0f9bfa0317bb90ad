"""One trace file as the steps of one rank: the only place that knows who reads traces."""

import gzip
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from meshwright.record import Step
from meshwright.record.kineto import measure_step
from meshwright.spec import SettingError

# Decoded whole, a trace takes several times its size.
MOST_BYTES = 2**28


class RankTrace(msgspec.Struct, frozen=True, kw_only=True):
    """What one file holds. rank: -1, and world_size: 0, where it does not say; device: "" likewise.

    kind: cpu, cuda or xla. producer: whose profiler wrote it, in words.
    """

    path: Path
    rank: int
    world_size: int
    device: str
    kind: str
    producer: str
    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()


# A file, and the seconds that its model FLOPs take at the device's peak.
Reader = Callable[[Path, float], RankTrace]


def read_rank(path: Path, useful_s: float) -> RankTrace:
    """One file's steps. Raises SettingError where it is no trace that can be read."""
    try:
        trace = msgspec.json.decode(read_text(path), type=dict[str, Any])
    except (OSError, EOFError, zlib.error, msgspec.DecodeError, RecursionError) as error:
        raise SettingError(str(path), f"cannot be read as a trace ({error})", "a whole .json or .json.gz") from None
    try:
        about = msgspec.convert(trace.get("distributedInfo") or {}, type=About)
        on_gpu = any(event.get("cat") == "kernel" for event in trace["traceEvents"])
        measured = measure_step(trace, step=0, rank=about.rank, host="", purposes={}, useful_s=useful_s)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise SettingError(str(path), "holds no step that was marked", "a trace of a run of meshwright train") from None
    return RankTrace(
        path=path,
        rank=about.rank,
        world_size=about.world_size,
        device="",
        kind="cuda" if on_gpu else "cpu",
        producer="PyTorch profiler",
        steps=(Step(measured=measured),),
    )


class About(msgspec.Struct, frozen=True):
    """What a trace says of the process that it is of."""

    rank: int = -1
    world_size: int = 0


def read_text(path: Path) -> bytes:
    """The file's text, unpacked; never more than is reasonable."""
    if not path.is_file():
        raise SettingError(str(path), "is no file", "a .json or .json.gz that a profiler wrote")
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        text = file.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise SettingError(str(path), f"is larger than {MOST_BYTES >> 20} MiB", "a trace of fewer steps")
    return text
