"""The words that prediction and measurement share: step, run and memory accounts. Loads no torch."""

from meshwright.account.base import Account, mean
from meshwright.account.memory import MemoryAccount
from meshwright.account.run import RunAccount
from meshwright.account.step import (
    CLOSING_TOLERANCE,
    MEANINGS,
    PURPOSES,
    MeasuredStep,
    Purpose,
    StepAccount,
    Transfer,
)
from meshwright.account.waits import ResolvedStep, split_waits

__all__ = [
    "CLOSING_TOLERANCE",
    "MEANINGS",
    "PURPOSES",
    "Account",
    "MeasuredStep",
    "MemoryAccount",
    "Purpose",
    "ResolvedStep",
    "RunAccount",
    "StepAccount",
    "Transfer",
    "mean",
    "split_waits",
]
