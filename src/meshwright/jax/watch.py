"""A function that is watched: when it was called, when the call came back, and what to wait for."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core

from meshwright.jax.flops import Counted, count_flops

# Of what a call returns, so many of its smallest arrays are kept to be waited for: some of them may be handed on, and
# are gone then. All arrays of a compiled program are ready at about the same moment.
KEPT = 4


class Called(NamedTuple):
    """One call of a compiled program, by the process's clock in seconds; `counted`: None where nobody counted.

    devices: over which its results are spread.
    """

    function: str
    entry_s: float
    exit_s: float
    outputs: tuple[jax.Array, ...]
    devices: int
    counted: Counted | None


class Watched:
    """Stands in for a function: calls it, and tells `note` of every call that is not part of another trace."""

    def __init__(self, function: Callable[..., Any], name: str, note: Callable[[Called], None]) -> None:
        self._function = function
        self._name = name
        self._note = note
        self._counted: Counted | None = None

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((arguments, options))):
            return self._function(*arguments, **options)
        entry_s = time.perf_counter()
        if self._counted is None:
            self._counted = self._count(arguments, options)
        outputs = self._function(*arguments, **options)
        exit_s = time.perf_counter()
        kept, devices = smallest(outputs)
        self._note(Called(self._name, entry_s, exit_s, kept, devices, self._counted))
        return outputs

    def __getattr__(self, name: str) -> Any:
        # jax.jit's functions are asked for `lower`, `trace` and others by those who hold them.
        return getattr(self._function, name)

    def _count(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> Counted:
        if not isinstance(self._function, jax.stages.Wrapped):
            return Counted(flops=None, why=f"{self._name} is not made by jax.jit")
        try:
            return count_flops(self._function, *arguments, **options)
        # Whatever it is, the call that follows will say it better; counting must not be what ends a program.
        except Exception as error:
            return Counted(flops=None, why=f"{self._name} could not be traced: {type(error).__name__}")


def smallest(outputs: Any) -> tuple[tuple[jax.Array, ...], int]:
    """The smallest arrays of a result, and over how many devices they are spread; none in a trace."""
    leaves = [x for x in jax.tree.leaves(outputs) if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)]
    kept = tuple(sorted(leaves, key=lambda leaf: leaf.size)[:KEPT])
    return kept, max((len(leaf.sharding.device_set) for leaf in kept), default=1)


def wait_for(outputs: tuple[jax.Array, ...]) -> bool | None:
    """Wait until one of a program's results is there, and say whether it was there already; None where all of them
    were handed on before."""
    for output in outputs:
        # Its types leave out what its documentation has.
        asked: Any = output
        try:
            there = bool(asked.is_ready())
            output.block_until_ready()
        # "deleted or donated": its memory belongs to a later step by now.
        except RuntimeError:
            continue
        return there
    return None
