"""From a profiler's trace, of any PyTorch program, to its steps' accounts.

`read_trace(path)` reads the file, `measure_trace(trace)` gives each of its steps as one rank measured it.
"""

from collections.abc import Mapping

from meshwright.account import Purpose
from meshwright.record.events import Step
from meshwright.record.kineto.marks import COLLECT, PHASES, PREFIX, ROWS, STEP, message_label
from meshwright.record.kineto.measure import measure_trace
from meshwright.record.kineto.reading import read_trace
from meshwright.record.kineto.trace import Trace

__all__ = [
    "COLLECT",
    "PHASES",
    "PREFIX",
    "ROWS",
    "STEP",
    "Trace",
    "measure_step",
    "measure_trace",
    "message_label",
    "read_trace",
]


def measure_step(
    trace: Trace, *, step: int, rank: int, host: str, purposes: Mapping[str, Purpose], useful_s: float
) -> Step:
    """The last step of a trace, whose number is `step`; the rest as in measure_trace. Raises ValueError for none."""
    steps, notes = measure_trace(
        trace, purposes=purposes, useful_s=useful_s, rank=rank, host=host, last=step, only_last=True
    )
    if not steps:
        raise ValueError(notes[-1] if notes else "the trace holds no step")
    return steps[-1]
