"""What JAX says of its own compiling, through the listeners of jax.monitoring."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

# Tracing, lowering and XLA's own compiling each end with one of these, which name the function (jax 0.10).
EVENTS = "/jax/core/compile/"
LAST = "backend_compile_duration"


class Compiled(NamedTuple):
    """A piece of compiling that has ended. function: "" where JAX does not say; ends: whether it was the last piece."""

    function: str
    start_s: float
    end_s: float
    ends: bool


class CompileListener:
    """Tells `note` of every piece of compiling in this process, from whichever thread it is done in, until closed."""

    def __init__(self, note: Callable[[Compiled], None]) -> None:
        self._note = note
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **words: str | int) -> None:
        if event.startswith(EVENTS):
            end_s = time.perf_counter()
            name = str(words.get("fun_name", "")).removeprefix("jit(").removesuffix(")")
            self._note(Compiled(name, end_s - duration_secs, end_s, event.endswith(LAST)))

    def close(self) -> None:
        """Listen no more."""
        forget: Any = jax.monitoring.unregister_event_duration_listener
        forget(self._listen)
