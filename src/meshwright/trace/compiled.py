"""What torch.compile has done in this process, asked without loading it, which takes seconds."""

import sys


def compiled() -> bool:
    """Whether torch.compile has compiled anything in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and dynamo.counters["stats"]["unique_graphs"] > 0


def compile_seconds() -> float:
    """Seconds that torch.compile has taken in this process so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is None:
        return 0.0
    spent = dynamo.cumulative_time_spent_ns
    return (spent.get("entire_frame_compile", 0.0) + spent.get("entire_backward_compile", 0.0)) * 1e-9
