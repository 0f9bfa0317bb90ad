"""Traces as JAX's profiler writes them: of its own, and made by hand. No JAX, no torch."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from meshwright.record.kineto import Trace, read_trace


def xla_trace(events: Sequence[Mapping[str, Any]]) -> Trace:
    """Events read back from a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made by hand.json"
        path.write_text(json.dumps({"displayTimeUnit": "ns", "traceEvents": events}))
        return read_trace(path)


def read_xla(folder: Path) -> Trace:
    """The one trace that jax.profiler wrote into a folder."""
    (path,) = folder.glob("plugins/profile/*/*.trace.json.gz")
    return read_trace(path)
