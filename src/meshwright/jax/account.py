"""From what one process saw of a step from outside its compiled programs to the step's account. Loads no JAX."""

import msgspec

from meshwright.account import MeasuredStep, StepAccount
from meshwright.account.intervals import Interval, intersect, length, subtract, union
from meshwright.record import Gap, HostCause, Step, StepDetail

# Gaps that a step's detail lists, and how long they are at least.
LISTED_GAPS = 10
LEAST_GAP_S = 1e-4


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """A watched program: called, and its results there (None: nobody could tell when), at most `late_s` before."""

    function: str
    entry_s: float
    done_s: float | None
    late_s: float = 0.0


class Lap(msgspec.Struct, frozen=True, kw_only=True):
    """One step as the training loop's thread went through it, by the process's clock in seconds.

    inputs: when it waited for a batch. collected: when it collected garbage.
    """

    step: int
    begin_s: float
    end_s: float
    inputs: tuple[Interval, ...]
    collected: tuple[Interval, ...]
    calls: tuple[Call, ...]

    @property
    def done_s(self) -> float | None:
        """When all that the step computed was there; None where it is not known of some program."""
        moments = [call.done_s for call in self.calls]
        known = [moment for moment in moments if moment is not None]
        return max(known) if known and len(known) == len(moments) else None

    @property
    def late_s(self) -> float:
        """How much before `done_s` it may have been."""
        return max((call.late_s for call in self.calls), default=0.0)


def measure_lap(lap: Lap, since_s: float, *, rank: int, host: str, useful_s: float) -> Step:
    """The step from when the one before it was done to when it was done itself.

    While a program is out, its device computes, moves or idles, and nobody outside can tell which: beyond its model
    FLOPs at the device's peak that time is `unseen`. No program out: the loop waits for a batch, or is late to call the
    next one, which is what `host` means. since_s: when the step before was done. useful_s: the step's model FLOPs at
    the device's peak, 0 where these are not known. Times are the process's clock's: seconds since 1970 have too few
    digits left for a step's parts to add up to it.
    Raises ValueError where it is not known when the step was done.
    """
    done_s = lap.done_s
    if done_s is None or done_s <= since_s:
        raise ValueError("the step's end was not seen")
    window = [(since_s, done_s)]
    out = union((call.entry_s, call.done_s) for call in lap.calls if call.done_s is not None)
    running = intersect(window, out)
    idle = subtract(window, running)
    waiting = intersect(idle, union(lap.inputs))
    late = subtract(idle, waiting)
    collecting = length(intersect(late, union(lap.collected)))
    useful_s = min(useful_s, length(running))
    causes: dict[HostCause, float] = {"collect": collecting, "python": length(late) - collecting}
    account = StepAccount(useful=useful_s, unseen=length(running) - useful_s, input=length(waiting), host=length(late))
    measured = MeasuredStep(
        step=lap.step,
        rank=rank,
        host=host,
        start_s=since_s,
        end_s=done_s,
        account=account,
    )
    gaps = [gap("input", "a wait for a batch", one, lap, since_s) for one in waiting]
    gaps += [gap("host", doing, one, lap, since_s) for one, doing in places(late, lap, out)]
    longest = sorted((one for one in gaps if one.seconds >= LEAST_GAP_S), key=lambda one: -one.seconds)[:LISTED_GAPS]
    host_s: dict[HostCause, float] = {cause: seconds for cause, seconds in causes.items() if seconds > 0}
    return Step(measured=measured, detail=StepDetail(gaps=tuple(longest), host=host_s, launches=len(lap.calls)))


def gap(bucket: str, doing: str, interval: Interval, lap: Lap, since_s: float) -> Gap:
    """A stretch without a program, told from the step's begin."""
    start, end = interval
    before = next((call.function for call in lap.calls if call.entry_s >= end), "")
    return Gap(start_s=start - since_s, seconds=end - start, bucket=bucket, doing=doing, before=before)


def places(late: list[Interval], lap: Lap, out: list[Interval]) -> list[tuple[Interval, str]]:
    """Where in the loop the thread was while it was late."""
    first_s = min((start for start, _ in out), default=lap.end_s)
    names = {
        "the loop, after the results": (float("-inf"), lap.begin_s),
        "the loop, before the program": (lap.begin_s, first_s),
        "the loop, between programs": (first_s, float("inf")),
    }
    return [(part, name) for name, stretch in names.items() for part in intersect(late, [stretch])]
