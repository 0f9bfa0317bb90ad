"""From a PyTorch profiler trace to a measured step."""

from collections.abc import Mapping
from typing import Any

import msgspec

from meshwright.account import MeasuredStep, Purpose
from meshwright.record.kineto.cpu import cpu_timeline
from meshwright.record.kineto.events import PHASES, PREFIX, ROWS, STEP, expert_rows, group_ranks, message_label
from meshwright.record.kineto.gpu import gpu_timeline
from meshwright.record.timeline import book

__all__ = ["PHASES", "PREFIX", "ROWS", "STEP", "measure_step", "message_label"]


def measure_step(
    trace: Mapping[str, Any], *, step: int, rank: int, host: str, purposes: Mapping[str, Purpose], useful_s: float
) -> MeasuredStep:
    """The last annotated step of a trace, as one rank saw it.

    purposes: what each process group is for, by the description it was made with ("mesh_shard" -> shard); groups that
        nobody named carry small syncs.
    useful_s: the step's model FLOPs on this rank over the device's peak, seconds (0 where no peak is known).
    Raises ValueError if the trace holds no annotated step.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    groups = group_ranks(trace)
    on_gpu = any(event.get("cat") == "kernel" for event in events)
    timeline = gpu_timeline(events, groups, purposes) if on_gpu else cpu_timeline(events, groups, purposes)
    measured = book(timeline, step=step, rank=rank, host=host, useful_s=useful_s)
    return msgspec.structs.replace(measured, expert_rows=expert_rows(events))
