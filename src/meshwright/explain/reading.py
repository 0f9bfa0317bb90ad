"""One trace file as the steps of one rank: the only place that knows who reads traces."""

from collections.abc import Callable
from pathlib import Path

import msgspec

from meshwright.record import Step
from meshwright.record.kineto import Trace, measure_trace, read_trace
from meshwright.record.kineto.steps import DEVICE, ENDLESS
from meshwright.spec import SettingError

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
    steps, notes = measure_trace(trace, useful_s=useful_s, rank=trace.rank)
    return RankTrace(
        path=path,
        rank=trace.rank,
        world_size=trace.world_size,
        device=trace.device,
        kind=kind_of(trace),
        producer=PRODUCERS.get(trace.producer, "a profiler"),
        steps=tuple(steps),
        notes=(*trace.notes, *notes),
    )


def kind_of(trace: Trace) -> str:
    """What the program ran on."""
    return "cuda" if trace.within(-ENDLESS, ENDLESS, DEVICE) else "cpu"
