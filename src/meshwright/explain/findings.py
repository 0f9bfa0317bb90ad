"""What stands out in the accounts, as plain sentences with their numbers."""

from meshwright.account import MEANINGS, MemoryAccount, StepAccount
from meshwright.explain.explanation import Finding, MeasuredSteps, MemoryComparison
from meshwright.explain.words import bytes_text, of_step, seconds_text
from meshwright.record import Metrics, Prediction

# A cause smaller than this share of the step is not worth a sentence.
WORTH_SAYING = 0.05
# A prediction further off than this, in a bucket worth saying something about, is called wrong.
PREDICTION_OFF = 0.25
# A prediction further off than this many times what was measured is compared with the step.
MOST_TIMES = 10
# Buckets that the plan sets to zero on purpose: time in them is no wrong prediction.
NOT_PREDICTED = ("straggler", "unseen", "other")


def find_in_step(step: MeasuredSteps, prediction: Prediction | None) -> list[Finding]:
    """Findings from the measured step, the largest loss first."""
    found = largest_loss(step.account)
    wrong = wrong_predictions(prediction.step, step.account) if prediction is not None else []
    return [found, *wrong] if found is not None else wrong


def largest_loss(account: StepAccount) -> Finding | None:
    """The bucket that costs most, apart from useful work."""
    known = account.useful > 0
    # Without a datasheet peak nothing divides compute into useful and the rest; naming it a loss would be wrong.
    not_losses = ("useful", "unseen") if known else ("useful", "unseen", "inefficiency")
    losses = [(name, seconds) for name, seconds in account.rows() if name not in not_losses]
    name, seconds = max(losses, key=lambda row: row[1])
    if seconds <= 0:
        return None
    start = "The most time that is not useful work" if known else "Beside compute, the most time"
    return Finding(what=f"{start} goes to {name} ({MEANINGS[name]}).", evidence=of_step(seconds, account.total()))


def wrong_predictions(predicted: StepAccount, measured: StepAccount) -> list[Finding]:
    """Buckets worth saying something about that the plan had wrong, the worst first."""
    least = WORTH_SAYING * measured.total()
    off: list[tuple[float, Finding]] = []
    for (name, guess), (_, seconds) in zip(predicted.rows(), measured.rows(), strict=True):
        worth = max(guess, seconds)
        if name not in NOT_PREDICTED and worth > least and abs(guess - seconds) > PREDICTION_OFF * max(seconds, 1e-12):
            text = f"The plan was off on {name}: it predicted {seconds_text(guess)}, measured {seconds_text(seconds)}."
            way = "Too high" if guess > seconds else "Too low"
            by = abs(guess - seconds)
            # Of next to nothing a share says nothing.
            hardly_any = by > MOST_TIMES * seconds
            evidence = of_step(by, measured.total()) if hardly_any else f"{by / seconds:.0%} of the measured time"
            off.append((by, Finding(what=text, evidence=f"{way} by {evidence}")))
    return [finding for _, finding in sorted(off, key=lambda item: -item[0])]


def find_in_memory(memory: MemoryComparison) -> list[Finding]:
    """Whether the fullest rank holds much more than was predicted: the way runs end out of memory."""
    predicted, measured = memory.predicted, memory.measured
    if predicted is None or measured is None or predicted.total() <= 0:
        return []
    excess = measured.total() - predicted.total()
    if excess <= PREDICTION_OFF * predicted.total():
        return []
    name = grown_most(predicted, measured)
    return [
        Finding(
            what=f"Memory is above the plan, most of it in {name.replace('_', ' ')}.",
            evidence=f"{bytes_text(measured.total())} on rank {memory.rank}, predicted {bytes_text(predicted.total())}",
        )
    ]


def grown_most(predicted: MemoryAccount, measured: MemoryAccount) -> str:
    """The part of memory that exceeds its prediction most."""
    return max((measured - predicted).rows(), key=lambda row: row[1])[0]


def find_in_losses(metrics: tuple[Metrics, ...]) -> list[Finding]:
    """Whether the loss stopped being a number."""
    broken = [line.step for line in metrics if line.loss is None]
    if not broken:
        return []
    return [
        Finding(
            what=f"The loss is not a finite number from step {broken[0]} on."
            if broken[-1] == metrics[-1].step
            else f"The loss was not a finite number at step {broken[0]}.",
            evidence=f"{len(broken)} of {len(metrics)} steps",
        )
    ]
