"""The run account: where a job's GPU-seconds went from allocation to release."""

import msgspec

from meshwright.account.base import Account
from meshwright.account.step import StepAccount


class RunAccount(Account, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Device-seconds of a whole run, all ranks together; the fields partition what was paid for.

    `steps` holds the training steps by the step account's buckets. `idle` is paid time outside everything else.
    """

    steps: StepAccount = msgspec.field(default_factory=StepAccount)
    startup: float = 0.0
    compile: float = 0.0
    evaluation: float = 0.0
    checkpoint: float = 0.0
    measurement: float = 0.0
    lost_work: float = 0.0
    detection: float = 0.0
    restart: float = 0.0
    idle: float = 0.0

    def yield_(self) -> float:
        """Useful device-seconds over paid device-seconds."""
        total = self.total()
        return self.steps.useful / total if total else 0.0
