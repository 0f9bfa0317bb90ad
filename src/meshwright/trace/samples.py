"""Which steps are profiled: seldom enough that it costs next to nothing, and the same ones on every rank."""

import math
from collections import deque
from statistics import median

from meshwright.trace.meeting import Meeting

# The first sample, so that a short run has one; before it come the steps that compile, are counted and warm up.
FIRST_SAMPLE = 6
# By then all ranks have heard of the next sample, whatever their background threads were doing.
NOTICE_S = 3.0
NOTICE_STEPS = 3
# Between samples, however little they cost.
SHORTEST_S = 10.0
# Steps whose median is what a step takes that is not profiled.
USUAL_STEPS = 32


class Samples:
    """The plan of one rank. `next` is the number of the next step to be profiled, -1 for none yet.

    every: a sample each so many steps, or None: as often as `budget` (a share of the steps' time) allows. Then rank 0
    decides, by what its samples cost, and the others hear of it; one who hears of it too late leaves that sample out.
    """

    def __init__(self, meeting: Meeting, *, first: int, every: int | None, budget: float, lead: int) -> None:
        self._meeting = meeting
        self._every = every
        self._budget = budget
        self._lead = lead
        # What steps took so far, and what it cost to profile some.
        self._trained_s = 0.0
        self._spent_s = 0.0
        # Samples decided so far, and what rank 0 has still to tell, or another to hear, of the last.
        self._number = 0
        self._untold: tuple[int, int] | None = None
        self._waiting = False
        self._usual: deque[float] = deque(maxlen=USUAL_STEPS)
        self.next = first + FIRST_SAMPLE if every is None else self._regular(first + lead)

    def _regular(self, at_least: int) -> int:
        """Samples in the middle between multiples, so that they are not what happens every so many steps."""
        if not self._every:
            return -1
        half = self._every // 2
        return half + self._every * max(0, math.ceil((at_least - half) / self._every))

    def took(self, step_s: float, *, profiled: bool, beside: bool) -> None:
        """A step took so long; profiled, or beside the reading of a sample, which may slow it."""
        self._trained_s += step_s
        if beside and not profiled and self._usual:
            self._spent_s += step_s - median(self._usual)
        elif not profiled:
            self._usual.append(step_s)

    def excess(self, steps_s: list[float]) -> float:
        """What steps took beyond others, seconds; 0 where no others are known."""
        return max(0.0, sum(steps_s) - len(steps_s) * median(self._usual)) if self._usual else 0.0

    def charge(self, seconds: float) -> None:
        """Something else than a sample has cost so much."""
        self._spent_s += seconds

    def spent(self, running: int, seconds: float) -> None:
        """A sample is over, at this cost, or was left out at none; `running`: the step that runs now."""
        self._spent_s += seconds
        if self._every is not None:
            self.next = self._regular(running + 1 + self._lead)
            return
        self.next = -1
        self._number += 1
        if self._meeting.rank != 0:
            self._waiting = True
            return
        # What the next one costs is as good as spent.
        due_s = (self._spent_s + seconds) / self._budget
        wait_s = max(due_s - self._trained_s, SHORTEST_S, NOTICE_S)
        usual_s = max(median(self._usual) if self._usual else 1.0, 1e-6)
        self.next = running + max(math.ceil(wait_s / usual_s), NOTICE_STEPS) + self._lead
        self._untold = self._number, self.next

    def listen(self, running: int) -> None:
        """In the background: tell the other ranks of the next sample, or hear of it."""
        untold, self._untold = self._untold, None
        if untold is not None:
            self._meeting.tell(f"sample/{untold[0]}", str(untold[1]))
        elif self._waiting and (word := self._meeting.told(f"sample/{self._number}")) is not None:
            step = int(word)
            self._waiting = step - self._lead <= running + 1
            if self._waiting:
                # Too late: the others take this one, and the one after it is waited for.
                self._number += 1
            else:
                self.next = step
