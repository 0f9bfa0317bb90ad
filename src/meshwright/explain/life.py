"""The run account: every paid device-second of every attempt, from the spans that the ranks wrote."""

from collections.abc import Mapping, Sequence

from meshwright.account import RunAccount, StepAccount
from meshwright.account.intervals import Interval, length, subtract, union
from meshwright.record import Ended, Event, Fault, Metrics, Span, Step

# Spans that name a run bucket. Where spans overlap, the one named first here has the time: a save inside a stretch of
# steps is a save.
BUCKETS = ("measurement", "checkpoint", "evaluation", "compile", "startup")

Events = Mapping[int, Sequence[Event]]


def run_account(attempts: Sequence[Events], steps: StepAccount | None, mfu: float | None) -> RunAccount:
    """Device-seconds of all attempts. `steps` is the measured mean step, by whose buckets the steps' time is divided.

    Without it, `mfu` (model FLOPs over peak) still tells the useful part, and the rest stays in `other`.
    """
    total = RunAccount()
    for number, events in enumerate(attempts):
        kept_before = first_step_after(attempts[number + 1 :])
        for lines in events.values():
            total = total + rank_account(lines, kept_before, steps, mfu)
    return total


def rank_account(
    lines: Sequence[Event], kept_before: float, steps: StepAccount | None, mfu: float | None
) -> RunAccount:
    """One rank's paid time in one attempt: from its first span's start to its last event."""
    spans = [line for line in lines if isinstance(line, Span) and line.end_s > line.start_s]
    if not spans:
        return RunAccount()
    paid: list[Interval] = [(min(span.start_s for span in spans), last_moment(lines))]
    left = paid
    seconds: dict[str, float] = {}
    for name in BUCKETS:
        own = union((span.start_s, span.end_s) for span in spans if span.name == name)
        after = subtract(left, own)
        seconds[name] = length(left) - length(after)
        left = after
    stretches = [kept_and_lost(span, kept_before) for span in spans if span.name == "step"]
    kept = subtract(left, union(lost for _, lost in stretches))
    lost_s = length(left) - length(kept)
    left = subtract(kept, union(kept_part for kept_part, _ in stretches))
    return RunAccount(
        steps=divide(length(kept) - length(left), steps, mfu), lost_work=lost_s, idle=length(left), **seconds
    )


def kept_and_lost(span: Span, kept_before: float) -> tuple[Interval, Interval]:
    """A stretch of steps, cut where a later attempt began again; either part may be empty."""
    kept_share = min(max(kept_before - first_step(span), 0.0), span.count) / max(span.count, 1)
    cut = span.start_s + kept_share * (span.end_s - span.start_s)
    return (span.start_s, cut), (cut, span.end_s)


def first_step(span: Span) -> int:
    """The first of the steps that share a span."""
    return span.step - span.count + 1


def divide(seconds: float, steps: StepAccount | None, mfu: float | None) -> StepAccount:
    """`seconds` of steps over the step account's buckets."""
    if steps is not None and steps.total() > 0:
        return steps.scaled(seconds / steps.total())
    useful = min(mfu or 0.0, 1.0) * seconds
    return StepAccount(useful=useful, other=seconds - useful)


def last_moment(lines: Sequence[Event]) -> float:
    """The time of a rank's last event."""
    moments = [line.end_s for line in lines if isinstance(line, Span)]
    moments += [line.time_s for line in lines if isinstance(line, Fault | Ended)]
    return max(moments)


def first_step_after(later: Sequence[Events]) -> float:
    """The first step that a later attempt ran: from there on, this attempt's steps were lost and done again."""
    steps = [
        first_step(line) if isinstance(line, Span) else line.measured.step
        for events in later
        for lines in events.values()
        for line in lines
        if isinstance(line, Step) or (isinstance(line, Span) and line.name == "step")
    ]
    return min(steps, default=float("inf"))


def mean_mfu(metrics: Sequence[Metrics]) -> float | None:
    """Model FLOPs utilisation over all steps, each weighted by its time; None where no peak is known."""
    known = [(line.mfu, line.step_s) for line in metrics if line.mfu is not None]
    seconds = sum(step_s for _, step_s in known)
    return sum(mfu * step_s for mfu, step_s in known) / seconds if seconds > 0 else None


def yield_of(account: RunAccount) -> float | None:
    """The yield, or None where nothing says what was useful (no datasheet peak, or nothing measured)."""
    return account.yield_() if account.steps.useful > 0 else None
