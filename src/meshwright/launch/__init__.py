"""Starting a job: the run folder, an attempt with its plan, and the process that trains. Loads no torch."""

from meshwright.launch.attempt import begin_attempt, forget_untrained, reopen_run
from meshwright.launch.calibration import CalibrationEnded, check_out, run_calibration, write_cluster
from meshwright.launch.hub import find_model
from meshwright.launch.process import become_agent, needs_torch, run_attempt
from meshwright.launch.rehearsal import RehearsalEnded, check_rehearsal_file, run_rehearsal, write_rehearsal
from meshwright.launch.verification import VerificationEnded, run_trials

__all__ = [
    "CalibrationEnded",
    "RehearsalEnded",
    "VerificationEnded",
    "become_agent",
    "begin_attempt",
    "check_out",
    "check_rehearsal_file",
    "find_model",
    "forget_untrained",
    "needs_torch",
    "reopen_run",
    "run_attempt",
    "run_calibration",
    "run_rehearsal",
    "run_trials",
    "write_cluster",
    "write_rehearsal",
]
