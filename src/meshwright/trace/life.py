"""From the moments of one rank's training, told once the device has come to them, to the lines of its record."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from meshwright.record import Span
from meshwright.trace.clock import Mark
from meshwright.trace.told import Told

# Steps share a span until this many seconds have passed, so that a long run stays a short file.
FLUSH_S = 10.0
# The name of the last moment.
END = "end"


class Moment(NamedTuple):
    """begin: a step begins, or goes on, after time that belongs to none (`name`: what that was). step: the step ends,
    and another one begins. leave: the running step is left; at the end of all with END for a name.

    profiled: whether the step was; of a "begin", whether the profiler was stopped before it and not started.
    compiled_s: what torch.compile took in the step.
    """

    kind: Literal["begin", "step", "leave"]
    mark: Mark
    step: int
    name: str = ""
    profiled: bool = False
    compiled_s: float = 0.0
    told: Told | None = None


class Life:
    """Takes the moments in their order, each with its time.

    write: takes the spans. stepped: told of each whole step with its seconds and its end. sampled: told, once a sample
    is over, what its pauses took and the seconds of its steps; returns how much of these is the profiler's.
    """

    def __init__(
        self,
        began_s: float,
        write: Callable[[Span], None],
        stepped: Callable[[Moment, float, float], None],
        sampled: Callable[[float, list[float]], float],
    ) -> None:
        self._write = write
        self._stepped = stepped
        self._sampled = sampled
        self._inside = False
        # Since when time belongs to no step, or the running step's present stretch; what it had before.
        self._outside_s: float = began_s
        self._since_s = 0.0
        self._had_s = 0.0
        # Of the span that steps share.
        self._first_s = 0.0
        self._count = 0
        self._last = 0
        # Of the sample that goes on.
        self._paused_s = 0.0
        self._steps_s: list[float] = []

    def take(self, moment: Moment, at_s: float) -> None:
        """The next moment."""
        match moment.kind:
            case "begin":
                self._begin(moment, at_s)
            case "step":
                self._step(moment, at_s)
            case "leave" if not self._inside:
                self._outside_s = at_s
            case "leave":
                # What follows the last whole step at the end of all is none.
                until_s = self._since_s if moment.name == END else at_s
                self._inside = False
                self._had_s += until_s - self._since_s
                self._flush(moment.step, until_s)
                self._outside_s = at_s

    def _begin(self, moment: Moment, at_s: float) -> None:
        if moment.name:
            self._write(Span(name=moment.name, start_s=self._outside_s, end_s=at_s, step=moment.step))
        if moment.name == "measurement":
            self._pause(moment, at_s)
        self._since_s = self._first_s = at_s
        self._inside = True

    def _pause(self, moment: Moment, at_s: float) -> None:
        paused_s = at_s - self._outside_s
        if not moment.profiled:
            # What a sample that was dropped has left does not count.
            self._paused_s, self._steps_s = paused_s, []
            return
        excess_s = self._sampled(self._paused_s + paused_s, self._steps_s)
        if excess_s:
            # The profiled steps lie before the pause; where spans overlap, a measurement has the time.
            begin_s = self._outside_s - excess_s
            self._write(Span(name="measurement", start_s=begin_s, end_s=self._outside_s, step=moment.step))

    def _step(self, moment: Moment, at_s: float) -> None:
        step_s = self._had_s + at_s - self._since_s
        if moment.compiled_s:
            self._write(
                Span(name="compile", start_s=at_s - min(moment.compiled_s, step_s), end_s=at_s, step=moment.step)
            )
        self._had_s, self._since_s = 0.0, at_s
        self._count += 1
        self._last = moment.step
        if moment.profiled:
            self._steps_s.append(step_s)
        self._stepped(moment, step_s, at_s)
        if at_s - self._first_s > FLUSH_S:
            self._flush(moment.step, at_s)

    def _flush(self, step: int, at_s: float) -> None:
        """Close the span that steps share; one that holds no whole step stands for the running one."""
        if at_s > self._first_s:
            last = self._last if self._count else step
            self._write(Span(name="step", start_s=self._first_s, end_s=at_s, step=last, count=max(1, self._count)))
        self._first_s, self._count = at_s, 0
