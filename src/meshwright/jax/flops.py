"""Model FLOPs of a function that jax.jit compiles, counted in what it was traced to.

Not by XLA's own cost analysis, which counts the body of a loop once however often it runs: of a model that scans over
its layers it would see one layer (measured with jax 0.10: a quarter of the FLOPs of four layers).
"""

from collections.abc import Iterator
from math import prod
from typing import Any

import jax
import msgspec
from jax.extend.core import ClosedJaxpr, Jaxpr

# Kernels written by hand or by a library, whose FLOPs a trace does not tell.
OPAQUE = ("pallas_call", "ffi_call", "custom_call", "dot_product_attention", "ragged_dot", "scaled_matmul")
# What jax.checkpoint leaves in a trace.
REMAT = ("remat", "remat2", "checkpoint")


class Counted(msgspec.Struct, frozen=True, kw_only=True):
    """FLOPs of one call, of all devices together.

    flops: by matrix products and convolutions; None where they cannot be told, for the reason in `why`. precision: of
    the operands of most of them, "" where there are none. recompute: whether jax.checkpoint runs parts again.
    """

    flops: float | None
    why: str = ""
    precision: str = ""
    recompute: bool = False


class _Tally:
    """What is added up on the way through a trace."""

    def __init__(self) -> None:
        self.by_precision: dict[str, float] = {}
        self.unknown: list[str] = []
        self.recompute = False

    def add(self, precision: str, flops: float) -> None:
        self.by_precision[precision] = self.by_precision.get(precision, 0.0) + flops


def count_flops(function: jax.stages.Wrapped, *arguments: Any, **options: Any) -> Counted:
    """The FLOPs of one call with these arguments, which it neither runs nor compiles; the call itself then reuses the
    trace that is made here."""
    tally = _Tally()
    _count(function.trace(*arguments, **options).jaxpr.jaxpr, 1.0, tally)
    flops = sum(tally.by_precision.values())
    precision = max(tally.by_precision, key=lambda name: tally.by_precision[name], default="")
    if tally.recompute:
        why = "jax.checkpoint runs parts of the model again, and a trace does not tell those from the model's own"
    elif tally.unknown:
        why = f"a trace does not tell the FLOPs of {tally.unknown[0]}"
    else:
        why = "" if flops else "no matrix product in it"
    return Counted(flops=None if why else flops, why=why, precision=precision, recompute=tally.recompute)


def _count(jaxpr: Jaxpr, times: float, tally: _Tally) -> None:
    """Add what a trace multiplies, as often as it runs."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            tally.add(_precision(equation), times * _product_flops(equation))
        elif name == "conv_general_dilated":
            tally.add(_precision(equation), times * _convolution_flops(equation))
        elif name.startswith(OPAQUE):
            tally.unknown.append(name)
        elif name == "cond":
            _count_branches(equation, times, tally)
        else:
            inner = list(_inner(equation.params))
            if name == "while" and any(_multiplies(one) for one in inner):
                tally.unknown.append("a loop of unknown length")
            tally.recompute |= name in REMAT and bool(equation.params.get("differentiated"))
            # A shard's part of the work is done by every device of its mesh.
            often = equation.params["length"] if name == "scan" else 1
            often = equation.params["mesh"].size if name == "shard_map" else often
            for one in inner:
                _count(one, times * often, tally)


def _count_branches(equation: Any, times: float, tally: _Tally) -> None:
    """Of branches that cost the same, one; which of unequal ones runs is not told."""
    branches = [_Tally() for _ in equation.params["branches"]]
    for branch, jaxpr in zip(branches, equation.params["branches"], strict=True):
        _count(jaxpr.jaxpr, times, branch)
    if any(branch.by_precision != branches[0].by_precision for branch in branches):
        tally.unknown.append("branches of different cost")
    for precision, flops in branches[0].by_precision.items():
        tally.add(precision, flops)
    tally.unknown += [reason for branch in branches for reason in branch.unknown]
    tally.recompute |= any(branch.recompute for branch in branches)


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """The traces inside of an equation; of a derivative rule only what runs without it."""
    for key, value in params.items():
        if key in ("jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd"):
            continue
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, ClosedJaxpr):
                yield one.jaxpr
            elif isinstance(one, Jaxpr):
                yield one


def _multiplies(jaxpr: Jaxpr) -> bool:
    """Whether a trace holds any matrix product."""
    tally = _Tally()
    _count(jaxpr, 1.0, tally)
    return bool(tally.by_precision or tally.unknown)


def _product_flops(equation: Any) -> float:
    """Two a multiplication: every element of the result is a sum over the contracted dims."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    return 2.0 * prod(equation.outvars[0].aval.shape) * prod(equation.invars[0].aval.shape[dim] for dim in contracted)


def _convolution_flops(equation: Any) -> float:
    """Likewise: each element of the result is a sum over a kernel's extent and its input features (per group)."""
    kernel = equation.invars[1].aval.shape
    features = equation.params["dimension_numbers"].rhs_spec[0]
    return 2.0 * prod(equation.outvars[0].aval.shape) * prod(kernel) / kernel[features]


def _precision(equation: Any) -> str:
    """Of the operands, as layouts name it where they do: bf16, fp32."""
    name = str(equation.invars[0].aval.dtype)
    return {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}.get(name, name)
