"""How sure a prediction is: the interval that 8 of 10 measurements are meant to lie in.

Half-widths are relative, in natural logarithms. They are what is left of published steps of others' trainers after one
factor a trainer and device (benchmarks/validate_planner.py prints how many lie inside), and of our own without any.
"""

from math import exp, hypot

from meshwright.account import MemoryAccount, StepAccount
from meshwright.spec import MESHWRIGHT, Job

Interval = tuple[float, float]

# Of a step, where the trainer's steps on such a device have been held against predictions.
HELD = 0.135
# Where they have not: also what the factors of trainers and devices spread over.
UNHELD = 0.22
# Of our own trainer's, where the constants come from: 12 of the 14 layouts that docs/benchmarks.md holds plans against.
OWN = 0.085
OWN_DEVICES = ("h200",)
# The same on one of them, with rates that were calibrated on the machine: those 14 were off by 2.2% at most. Layouts of
# several GPUs have not been held against such a plan.
CALIBRATED = 0.03
# On processes that share a machine's cores, which other programs use too.
SHARED = 0.3
# Of exposed transfers, and of waiting for the host.
TRANSFERS = 0.1
HOST = 0.10
# Of memory: our own trainer's, and others'.
OWN_MEMORY = 0.08
OTHER_MEMORY = 0.12


def step_interval(job: Job, account: StepAccount, *, held: bool = False) -> Interval:
    """Seconds of a step, from and to; (0, 0) where it is not known.

    held: whether the trainer's steps on this device have been held against predictions, and these scaled to them.
    """
    whole_s = account.total()
    if not whole_s:
        return 0.0, 0.0
    device, own = job.cluster.device, job.trainer.name == MESHWRIGHT.name
    base = HELD if held else UNHELD
    if device.kind == "cpu":
        base = SHARED
    elif own and device.name in OWN_DEVICES:
        measured, alone = job.cluster.measured, job.layout.world_size == 1
        base = CALIBRATED if measured is not None and measured.is_steady and alone else OWN
    sent_s = sum(seconds for name, seconds in account.rows() if name.startswith("comm."))
    width = hypot(base, TRANSFERS * sent_s / whole_s, HOST * account.host / whole_s)
    return whole_s * exp(-width), whole_s * exp(width)


def memory_interval(job: Job, account: MemoryAccount) -> Interval:
    """Bytes of the fullest rank, from and to."""
    width = OWN_MEMORY if job.trainer.name == MESHWRIGHT.name else OTHER_MEMORY
    return account.total() * exp(-width), account.total() * exp(width)
