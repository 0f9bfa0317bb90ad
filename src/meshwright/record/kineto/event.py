"""One event of a profiler trace, as the readers of traces see it."""

import msgspec


class Arguments(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What the readers use of an event's `args`; empty or -1 where the trace does not say.

    correlation: the same in a kernel and the call that launched it. external: the same in an operator and what it
    launched. sequence: number of the forward operator that autograd gives to its backward node too; an operator has one
    only where gradients are recorded. collective, group, description, ranks, elements, dtype: of a communication
    kernel, or of the operator record_param_comms. hlo, module: an operation of a compiled XLA program, and the program;
    device, run: on which of the process's devices, and in which execution, which has the same number where it is
    launched. step: number of an annotated step of XLA's profiler.
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
    """A complete event. Times in seconds on the trace's own clock; category as Kineto names it: cpu_op, kernel, ...

    Process and thread are the numbers that Kineto writes, or the names that XLA gives; its events have no category.
    """

    name: str
    category: str
    process: str
    thread: str
    start_s: float
    end_s: float
    args: Arguments = Arguments()
