"""The measuring producer of the accounts: annotations, profiled steps, memory at the peak."""

from meshwright.trace.memory import MemoryProbe
from meshwright.trace.recorder import Recorder

__all__ = ["MemoryProbe", "Recorder"]
