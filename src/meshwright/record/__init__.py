"""The run folder: one writer, one reader, lines of JSON between them. Loads no torch."""

from meshwright.record.events import Ended, Evaluation, Event, Fault, Memory, Metrics, Prediction, Span, Step
from meshwright.record.folder import (
    MANIFEST,
    LineWriter,
    RunFolder,
    create_run,
    open_run,
    read_events,
    read_lines,
    read_metrics,
    read_prediction,
    replace_text,
    start_attempt,
)

__all__ = [
    "MANIFEST",
    "Ended",
    "Evaluation",
    "Event",
    "Fault",
    "LineWriter",
    "Memory",
    "Metrics",
    "Prediction",
    "RunFolder",
    "Span",
    "Step",
    "create_run",
    "open_run",
    "read_events",
    "read_lines",
    "read_metrics",
    "read_prediction",
    "replace_text",
    "start_attempt",
]
