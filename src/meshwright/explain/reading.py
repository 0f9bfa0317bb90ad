"""One trace file as the steps of one rank: the only place that knows who reads traces."""

from collections.abc import Callable
from pathlib import Path

import msgspec

from meshwright.record import Step
from meshwright.record.kineto import measure_trace, read_trace
from meshwright.spec import SettingError

# Whose profiler writes what the reader calls "kineto" and "xla".
PRODUCERS = {"kineto": "PyTorch profiler", "xla": "JAX profiler"}


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
    trace = read_trace(path)
    if trace.producer == "xla":
        raise SettingError(str(path), "is of JAX's profiler, which is not read yet", "a trace of torch.profiler")
    steps, notes = measure_trace(trace, useful_s=useful_s)
    # One step tells: all of a large trace's kernels at once would fill the memory.
    on_gpu = any(trace.within(one.measured.start_s, one.measured.end_s, ("kernel",)) for one in steps[:1])
    return RankTrace(
        path=path,
        rank=trace.rank,
        world_size=trace.world_size,
        device=trace.device,
        kind="xla" if trace.producer == "xla" else "cuda" if on_gpu else "cpu",
        producer=PRODUCERS.get(trace.producer, "profiler traces"),
        steps=tuple(steps),
        notes=(*trace.notes, *notes),
    )
