"""From the account to what to do: one row a cause, one small function each (causes.py, costs.py)."""

from collections.abc import Callable
from functools import partial

import msgspec

from meshwright.account import PURPOSES
from meshwright.explain import causes, costs
from meshwright.explain.case import Case
from meshwright.explain.explanation import Advice

# Of a step. What a program does wrong is worth a sentence from about the size on at which steps differ by themselves.
FAULT = 0.03
# What a layout costs by design can only be traded for something else: less than a tenth is seldom won by that.
COST = 0.1


class Cause(msgspec.Struct, frozen=True):
    """A cause, the least share of a step at which it is named, and what finds it."""

    names: tuple[str, ...]
    least: float
    find: Callable[[Case], Advice | None]


CAUSES = (
    Cause(("input",), FAULT, causes.late_input),
    Cause(("synchronize",), FAULT, causes.synchronizing),
    Cause(("launch", "microbatch"), FAULT, causes.launching),
    Cause(("host",), FAULT, causes.host_late),
    Cause(("collect",), FAULT, causes.collecting),
    Cause(("memory",), FAULT, causes.allocating),
    Cause(("checkpoint",), FAULT, causes.saving),
    Cause(("straggler",), FAULT, causes.straggling),
    # It has shares of its own: above a smaller one of `other` the account is poor.
    Cause(("unexplained",), 0.0, causes.unexplained),
    Cause(("imbalance",), FAULT, costs.uneven),
    Cause(("bubble",), COST, costs.bubble),
    *(Cause((f"exposed {purpose}",), COST, partial(costs.exposed, purpose)) for purpose in PURPOSES),
    Cause(("recompute",), FAULT, costs.recomputing),
    Cause(("optimizer",), COST, costs.updating),
    Cause(("contention",), COST, costs.slowed),
    Cause(("precision",), FAULT, costs.imprecise),
)


def give_advice(case: Case) -> tuple[Advice, ...]:
    """What would gain most first; what nobody can size last. Nothing of what is not worth it."""
    found = [(advice, cause.least) for cause in CAUSES if (advice := cause.find(case)) is not None]
    worth = [one for one, least in found if one.gain_s is None or one.gain_s > least * case.wall_s]
    return tuple(sorted(worth, key=lambda one: -(one.gain_s if one.gain_s is not None else 0.0)))
