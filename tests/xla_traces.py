"""Traces as JAX's profiler writes them, in memory, and made by hand. No JAX, no torch."""

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from meshwright.record.kineto.trace import Arguments, Event, Trace

KEYS = {"hlo_op": "hlo", "hlo_module": "module"}
NUMBERS = {"correlation_id": "correlation", "device_ordinal": "device", "run_id": "run", "step_num": "step"}


class _Listed:
    """One process's trace. Times in seconds from its first event."""

    def __init__(self, events: Sequence[Mapping[str, Any]], path: str = "made by hand") -> None:
        self.path, self.rank, self.world_size, self.base_s, self.producer = path, -1, 0, 0.0, "xla"
        self.groups: dict[str, tuple[str, tuple[int, ...]]] = {}
        named = [e for e in events if e.get("ph") == "M"]
        processes = {e["pid"]: e["args"]["name"] for e in named if e["name"] == "process_name"}
        threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in named if e["name"] == "thread_name"}
        complete = sorted((e for e in events if e.get("ph") == "X"), key=lambda e: e["ts"])
        first = complete[0]["ts"]
        self._events = [
            Event(
                name=e["name"],
                category="",
                process=processes[e["pid"]],
                thread=threads[e["pid"], e["tid"]],
                start_s=(e["ts"] - first) * 1e-6,
                end_s=(e["ts"] + e["dur"] - first) * 1e-6,
                args=arguments(e.get("args", {})),
            )
            for e in complete
        ]

    def marks(self) -> Sequence[Event]:
        """Steps."""
        return [e for e in self._events if e.args.step >= 0]

    def within(self, start_s: float, end_s: float) -> Sequence[Event]:
        """Events that lie in this stretch, wholly or in part."""
        return [e for e in self._events if e.start_s < end_s and e.end_s > start_s]


def arguments(args: Mapping[str, Any]) -> Arguments:
    told: dict[str, Any] = {KEYS[key]: str(value) for key, value in args.items() if key in KEYS}
    told |= {NUMBERS[key]: int(value) for key, value in args.items() if key in NUMBERS}
    return Arguments(**told)


def xla_trace(events: Sequence[Mapping[str, Any]]) -> Trace:
    """A trace of these events."""
    return _Listed(events)


def read_xla(folder: Path) -> Trace:
    """The one trace that jax.profiler wrote into a folder."""
    (path,) = folder.glob("plugins/profile/*/*.trace.json.gz")
    return _Listed(json.loads(gzip.decompress(path.read_bytes()))["traceEvents"], str(path))
