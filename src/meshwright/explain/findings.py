"""What stands out in the accounts, as plain sentences with their numbers."""

from meshwright.account import MEANINGS, MemoryAccount, StepAccount
from meshwright.explain.explanation import Finding, MeasuredSteps, MemoryComparison
from meshwright.explain.words import bytes_text, ranks_text, seconds_text
from meshwright.record import Metrics, Prediction

# A cause smaller than this share of the step is not worth a sentence.
WORTH_SAYING = 0.05
# A wait of this share of the step is what the run is bound by.
BOUND = 0.2
# A prediction further off than this, in a bucket worth saying something about, is called wrong.
PREDICTION_OFF = 0.25
# A prediction further off than this many times what was measured is compared with the step.
MOST_TIMES = 10
# Where the second rank is waited for this much of what the first is, naming only the first would accuse it wrongly.
IN_TURN = 0.6
# Buckets that the plan sets to zero on purpose: time in them has a finding of its own, not a wrong prediction.
NOT_PREDICTED = ("straggler", "other")


def find_in_step(step: MeasuredSteps, prediction: Prediction | None, *, cpu: bool) -> list[Finding]:
    """Findings from the measured step, the largest loss first."""
    findings = [largest_loss(step.account), straggling_rank(step), waiting_on_input(step.account)]
    findings.append(waiting_on_host(step.account, cpu=cpu))
    if prediction is not None:
        findings += wrong_predictions(prediction.step, step.account)
    return [finding for finding in findings if finding is not None]


def largest_loss(account: StepAccount) -> Finding | None:
    """The bucket that costs most, apart from useful work."""
    known = account.useful > 0
    # Without a datasheet peak nothing divides compute into useful and the rest; naming it a loss would be wrong.
    not_losses = ("useful",) if known else ("useful", "inefficiency")
    losses = [(name, seconds) for name, seconds in account.rows() if name not in not_losses]
    name, seconds = max(losses, key=lambda row: row[1])
    if seconds <= 0:
        return None
    start = "The most time that is not useful work" if known else "Beside compute, the most time"
    return Finding(what=f"{start} goes to {name} ({MEANINGS[name]}).", evidence=of_step(seconds, account.total()))


def straggling_rank(step: MeasuredSteps) -> Finding | None:
    """The rank that others waited for, if it cost one of them more than WORTH_SAYING of the step.

    Where only all waits together cost as much, it is no single rank's doing.
    """
    total = step.account.total()
    culprits = sorted(step.waited_for(), key=step.longest_wait_for, reverse=True)
    waits = [step.longest_wait_for(rank) for rank in culprits]
    least = WORTH_SAYING * total
    if not waits or total <= 0 or max(waits[0], step.account.straggler) <= least:
        return None
    worst = culprits[0]
    late = [rank for rank, wait in zip(culprits, waits, strict=True) if wait > IN_TURN * waits[0]]
    if len(late) > 1 or waits[0] <= least:
        among = f"waits of similar length for {ranks_text(sorted(late))}" if len(late) > 1 else f"most for rank {worst}"
        return Finding(
            what="Ranks are late in turn, and the others wait: no single rank is at fault.",
            evidence=f"{of_step(step.account.straggler, total)} on average; {among}",
        )
    others = [rank for rank, waited in step.blame.items() if waited.get(worst, 0.0) > 0]
    return Finding(
        what=f"Rank {worst} is slower than its peers at equal work; they wait for it.",
        evidence=f"{of_step(waits[0], total)} on the rank that waits longest; it holds up {ranks_text(others)}, "
        f"{seconds_text(step.waited_for()[worst])} of device time per step in all",
    )


def waiting_on_input(account: StepAccount) -> Finding | None:
    """Whether the next batch comes too late."""
    return waiting_on("input", account, "devices wait for the next batch")


def waiting_on_host(account: StepAccount, *, cpu: bool) -> Finding | None:
    """Whether work is launched too late; on a CPU, where the process is the device, whether Python takes its time."""
    why = "Python runs outside operators, and nothing computes" if cpu else "devices idle until late work is launched"
    return waiting_on("host", account, why)


def waiting_on(bucket: str, account: StepAccount, why: str) -> Finding | None:
    """A bucket worth saying something about, called the run's bound where it is large."""
    share = account.share(bucket)
    if share <= WORTH_SAYING:
        return None
    what = f"The run is {bucket}-bound: {why}." if share > BOUND else f"The {bucket} bucket costs time: {why}."
    return Finding(what=what, evidence=of_step(share * account.total(), account.total()))


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


def of_step(seconds: float, total: float) -> str:
    """ "0.123 s of each step (12%)"."""
    return f"{seconds_text(seconds)} of each step ({seconds / total:.0%})"
