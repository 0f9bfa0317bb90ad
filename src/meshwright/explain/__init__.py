"""Predicted against measured: explaining is subtraction. Loads no torch."""

from meshwright.explain.explanation import (
    Advice,
    Explanation,
    Finding,
    MeasuredSteps,
    MemoryComparison,
    RankFault,
    RunLife,
)
from meshwright.explain.paths import explain_paths
from meshwright.explain.run import explain_run

__all__ = [
    "Advice",
    "Explanation",
    "Finding",
    "MeasuredSteps",
    "MemoryComparison",
    "RankFault",
    "RunLife",
    "explain_paths",
    "explain_run",
]
