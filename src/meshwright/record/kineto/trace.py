"""A profiler trace in Chrome's format as the readers of it see one: events by time, and what stands beside them."""

from collections.abc import Sequence
from typing import Protocol

import msgspec


class Arguments(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What the readers use of an event's `args`; empty or -1 where the trace does not say.

    correlation: the same in a kernel and the call that launched it. external: the same in an operator and what it
    launched. sequence: number of the forward operator that autograd gives to its backward node too; an operator has one
    only where gradients are recorded. collective, group, description, ranks, elements, dtype: of a communication
    kernel, or of the operator record_param_comms. hlo, module: XLA's instruction and program; device, run: on which of
    the process's devices, and in which execution, which has the same number where it is launched. step: of an
    annotation that numbers steps.
    """

    correlation: int = -1
    external: int = -1
    sequence: int = -1
    stream: int = -1
    collective: str = ""
    group: str = ""
    description: str = ""
    ranks: tuple[int, ...] = ()
    elements: int = -1
    dtype: str = ""
    source: int = -1
    target: int = -1
    launch_shape: str = ""
    hlo: str = ""
    module: str = ""
    device: int = -1
    run: int = -1
    step: int = -1


class Event(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A complete event. Times in seconds on the trace's own clock; category as Kineto names it: cpu_op, kernel, ..."""

    name: str
    category: str
    process: str
    thread: str
    start_s: float
    end_s: float
    args: Arguments = Arguments()


class Trace(Protocol):
    """One rank's trace.

    rank: -1 where the trace does not say. base_s: the epoch's second at which its clock begins (0 where unknown), by
    which the clocks of several ranks of one host are compared. groups: description and ranks of each process group, by
    the name that events use. dropped: categories of events that were left out, with their number.
    """

    path: str
    rank: int
    world_size: int
    base_s: float
    producer: str
    groups: dict[str, tuple[str, tuple[int, ...]]]

    def marks(self) -> Sequence[Event]:
        """All annotations on the host (user_annotation), in order of time."""
        ...

    def within(self, start_s: float, end_s: float) -> Sequence[Event]:
        """All events that lie in this stretch, wholly or in part, in order of their begin."""
        ...
