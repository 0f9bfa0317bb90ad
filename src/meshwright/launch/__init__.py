"""Starting a job: the run folder, an attempt with its plan, and the process that trains. Loads no torch."""

from meshwright.launch.attempt import begin_attempt, reopen_run
from meshwright.launch.process import needs_torch, run_attempt

__all__ = ["begin_attempt", "needs_torch", "reopen_run", "run_attempt"]
