"""The measuring producer of the accounts, for our own trainer and for any: profiled steps, memory at the peak."""

from meshwright.trace.memory import MemoryProbe
from meshwright.trace.recorder import Recorder
from meshwright.trace.recording import Recording
from meshwright.trace.start import record

__all__ = ["MemoryProbe", "Recorder", "Recording", "record"]
