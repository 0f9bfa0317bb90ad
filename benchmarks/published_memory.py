"""Predicted memory against published rows: what fits, what is held between steps, and the peak."""

import re
from collections.abc import Sequence
from statistics import median

from published_rows import Row
from validation_bars import Bar, by_source, percentile_90

from meshwright.account import MemoryAccount
from meshwright.plan import predict_memory
from meshwright.plan.frame import build_frame
from meshwright.plan.memory import WORKSPACE_BYTES, boundary_bytes, held_bytes, sum_held
from meshwright.spec import Job
from meshwright.spec.devices import GIB, LEFT_TO_PROGRAMS

MIB = 2**20
# What a state may be off by, where 1% of it is less.
STATE_SLACK_BYTES = 150 * MIB


def report_memory(rows: Sequence[Row]) -> list[Bar]:
    """Every figure of memory that the rows allow."""
    bars: list[Bar] = []
    for source, each in by_source(rows).items():
        measured = [row for row in each if row.memory_gib]
        bars += report_fit(source, each) + report_states(source, measured) + report_peak(source, measured)
    return bars


def capacity_bytes(row: Row) -> float:
    """Of the row's device: by the row's own count of GB, else the hardware table's."""
    given = row.cells["gpu_mem_gb"]
    return LEFT_TO_PROGRAMS * float(given) * GIB if given else row.job.cluster.device.memory_bytes


def report_fit(source: str, rows: Sequence[Row]) -> list[Bar]:
    """How well what runs is told from what runs out of memory."""
    told = [(row.fits, predict_memory(row.job).total() <= capacity_bytes(row)) for row in rows]
    ran = [fits for truth, fits in told if truth]
    failed = [fits for truth, fits in told if not truth]
    if not ran or not failed:
        return []
    missed = sum(failed) / len(failed)
    balanced = (sum(ran) / len(ran) + 1 - missed) / 2
    return [
        Bar(source=source, figure="fits: balanced accuracy", rows=len(rows), value=balanced, least=0.90),
        Bar(source=source, figure="ran out of memory, called a fit", rows=len(failed), value=missed, most=0.05),
    ]


def last_rank(job: Job) -> tuple[MemoryAccount, float]:
    """What a rank of the last stage holds, and of that, what came over its stages' ends."""
    frame = build_frame(job)
    part = frame.parts[-1]
    return held_bytes(job, part, frame.timetable.alive[part.rank]), boundary_bytes(job, part)


def report_states(source: str, rows: Sequence[Row]) -> list[Bar]:
    """Parameters, gradients and optimizer states against what a rank holds between steps."""
    off: list[float] = []
    for row in rows:
        steady = re.search(r"steady mem-allocated-bytes (\d+)", row.cells["notes"])
        if not steady:
            continue
        account, ends = last_rank(row.job)
        states = account.parameters + account.gradients + account.optimizer_states
        between = states + WORKSPACE_BYTES + (0.0 if row.job.trainer.gathers else ends)
        off.append(abs(between - int(steady[1])) / max(0.01 * int(steady[1]), STATE_SLACK_BYTES))
    if not off:
        return []
    inside = sum(each <= 1 for each in off) / len(off)
    return [Bar(source=source, figure="states within 1% or 150 MiB", rows=len(off), value=inside, least=1.0)]


def predicted_peak(row: Row) -> float | None:
    """Bytes of what the row has measured, as its kind says; None where it does not say."""
    kind = row.cells["mem_kind"].lower()
    account = predict_memory(row.job)
    if "allocated" in kind:
        held = last_rank(row.job)[0] if "last rank" in kind else account
        return sum_held(held) + WORKSPACE_BYTES
    if "reserved" in kind:
        return sum_held(account) + account.fragmentation
    return account.total() if "nvidia-smi" in kind else None


def report_peak(source: str, rows: Sequence[Row]) -> list[Bar]:
    """The peak, against what was measured of it."""
    errors: list[float] = []
    for row in rows:
        peak = predicted_peak(row)
        if peak is not None:
            errors.append(abs(peak / (row.memory_gib * GIB) - 1))
    if not errors:
        return []
    return [
        Bar(source=source, figure="peak: median error", rows=len(errors), value=median(errors), most=0.06),
        Bar(source=source, figure="peak: 90th percentile", rows=len(errors), value=percentile_90(errors), most=0.15),
    ]
