"""From a profiler's trace, of any PyTorch program, to its steps' accounts.

`read_trace(path)` reads the file, `measure_trace(trace)` gives each of its steps as one rank measured it.
"""

from collections.abc import Mapping

from meshwright.account import Purpose
from meshwright.record.events import Step
from meshwright.record.kineto.marks import COLLECT, PHASES, PREFIX, ROWS, STEP, message_label
from meshwright.record.kineto.measure import NO_LEAD, measure_trace
from meshwright.record.kineto.reading import read_trace
from meshwright.record.kineto.stand_ins import STAND_IN
from meshwright.record.kineto.trace import Trace

__all__ = [
    "COLLECT",
    "PHASES",
    "PREFIX",
    "ROWS",
    "STAND_IN",
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
    """The last step that a recorder of ours annotated in a trace; the rest as in measure_trace.

    step: its number. Raises ValueError where the trace does not hold it, or, of a GPU, not the step before it.
    """
    steps, notes = measure_trace(
        trace, purposes=purposes, useful_s=useful_s, rank=rank, host=host, last=step, only_last=True
    )
    if not any(mark.name == STEP for mark in trace.marks()):
        raise ValueError("the trace holds no annotated step")
    if NO_LEAD in notes or not steps:
        raise ValueError(notes[-1])
    return steps[-1]
