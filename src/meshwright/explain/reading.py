"""One trace file as the steps of the ranks it holds: the only place that knows who reads traces."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from meshwright.account import Purpose
from meshwright.record import Step
from meshwright.record.kineto import Trace, measure_trace, read_trace
from meshwright.record.kineto.measure import clock_s
from meshwright.record.kineto.xla import measure_xla_trace

# Whose profiler writes what the reader calls "kineto" and "xla".
PRODUCERS = {"kineto": "PyTorch profiler", "xla": "JAX profiler"}


class RankTrace(msgspec.Struct, frozen=True, kw_only=True):
    """What a file holds of one rank. rank: -1, and world_size: 0, where it does not say; device: "" likewise.

    kind: cpu, cuda or xla. producer: whose profiler wrote it, in words. place: which of the file's devices it is, where
    a file holds those of a whole process; -1 where a file is one rank's. carriers: names of what moves data between
    ranks, of which a purpose can be told: process groups, or XLA's collectives and their kinds.
    """

    path: Path
    rank: int
    world_size: int
    device: str
    kind: str
    producer: str
    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()
    place: int = -1
    carriers: frozenset[str] = frozenset()


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """What no trace says. useful_s: seconds that a rank's model FLOPs of a step take at the device's peak, 0 where
    unknown. purposes: of process groups or collectives, by name.
    """

    useful_s: float = 0.0
    purposes: Mapping[str, Purpose] = {}


Reader = Callable[[Path, Told], Sequence[RankTrace]]


def read_ranks(path: Path, told: Told) -> list[RankTrace]:
    """One file's steps, rank by rank. Raises SettingError where it is no trace that can be read."""
    trace = read_trace(path)
    return devices_of(trace, path, told) if trace.producer == "xla" else [rank_of(trace, path, told)]


def rank_of(trace: Trace, path: Path, told: Told) -> RankTrace:
    """A file of PyTorch's profiler, which is one rank's."""
    steps, notes = measure_trace(trace, purposes=told.purposes, useful_s=told.useful_s)
    # One step tells: all of a large trace's kernels at once would fill the memory.
    from_s, kernels = clock_s(trace), ("kernel",)
    on_gpu = any(trace.within(one.measured.start_s - from_s, one.measured.end_s - from_s, kernels) for one in steps[:1])
    return RankTrace(
        path=path,
        rank=trace.rank,
        world_size=trace.world_size,
        device=trace.device,
        kind="cuda" if on_gpu else "cpu",
        producer=PRODUCERS.get(trace.producer, "profiler traces"),
        steps=tuple(steps),
        notes=(*trace.notes, *notes),
        carriers=frozenset(name for group, (words, _) in trace.groups.items() for name in (group, words) if name),
    )


def devices_of(trace: Trace, path: Path, told: Told) -> list[RankTrace]:
    """A file of JAX's profiler, which holds every device of a process."""
    found = measure_xla_trace(trace, purposes=told.purposes, useful_s=told.useful_s)
    return [
        RankTrace(
            path=path,
            rank=-1,
            world_size=0,
            device=found.platform,
            kind="xla",
            producer=PRODUCERS["xla"],
            steps=tuple(steps),
            notes=(*trace.notes, *found.notes),
            place=device,
            carriers=found.collectives,
        )
        for device, steps in found.devices.items()
    ]
