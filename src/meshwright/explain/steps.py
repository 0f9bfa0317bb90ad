"""The measured step account: what the profiled steps of all ranks say together."""

from collections.abc import Collection, Mapping, Sequence
from statistics import median

import msgspec

from meshwright.account import CLOSING_TOLERANCE, MeasuredStep, ResolvedStep, mean, split_waits
from meshwright.explain.explanation import MeasuredSteps
from meshwright.explain.pipeline import WAITS_IN_TURN, account_pipeline, account_unknown_pipeline
from meshwright.explain.words import seconds_text
from meshwright.record import Event, Metrics, Step, StepDetail
from meshwright.spec import Job

# Profiled and other steps whose times differ by less than this share count as the same.
ALIKE = 0.1


class RankStep(msgspec.Struct, frozen=True, kw_only=True):
    """A profiled step of one rank: its account with waits told from transfers, and what its trace tells beyond."""

    resolved: ResolvedStep
    detail: StepDetail | None = None


def measure_steps(events: Mapping[int, Sequence[Event]], job: Job | None = None) -> MeasuredSteps | None:
    """The account of the steps that `resolve_steps` finds; None where there is none."""
    steps = resolve_steps(events, job)
    return summarise([one.resolved for ranks in steps for one in ranks]) if steps else None


def resolve_steps(events: Mapping[int, Sequence[Event]], job: Job | None = None) -> list[list[RankStep]]:
    """The profiled steps that every rank with any profiled step has, ranks in order.

    job: whose steps they are, where it is known; a pipeline's waits mean something else than others.

    A step that some rank has not written yet cannot be split into transfer and waiting, so it is left out.
    """
    by_step: dict[int, dict[int, Step]] = {}
    for rank, lines in events.items():
        for line in lines:
            if isinstance(line, Step):
                by_step.setdefault(line.measured.step, {})[rank] = line
    seen = {rank for ranks in by_step.values() for rank in ranks}
    found: list[list[RankStep]] = []
    for _, ranks in sorted(by_step.items()):
        if ranks.keys() == seen:
            lines = [ranks[rank] for rank in sorted(seen)]
            resolved = resolve_waits([line.measured for line in lines], job)
            found.append(
                [RankStep(resolved=one, detail=line.detail) for one, line in zip(resolved, lines, strict=True)]
            )
    return found


def resolve_waits(ranks: Sequence[MeasuredStep], job: Job | None) -> list[ResolvedStep]:
    """One step, its waits divided by what is known of why ranks wait."""
    if job is not None and job.layout.pipeline > 1:
        return account_pipeline(split_waits(ranks, WAITS_IN_TURN), job)
    if job is None and any(transfer.purpose == "pipeline" for one in ranks for transfer in one.transfers):
        return account_unknown_pipeline(split_waits(ranks, WAITS_IN_TURN))
    return split_waits(ranks)


def summarise(resolved: Sequence[ResolvedStep]) -> MeasuredSteps:
    """Means over steps and ranks, the blame table, and whether the account closes."""
    steps = sorted({one.step for one in resolved})
    by_rank: dict[int, list[ResolvedStep]] = {}
    for one in resolved:
        by_rank.setdefault(one.rank, []).append(one)
    ranks = {rank: mean([one.account for one in ones]) for rank, ones in by_rank.items()}
    walls = {rank: sum(one.wall_s for one in ones) / len(ones) for rank, ones in by_rank.items()}
    shares = {rank: ranks[rank].other / walls[rank] if walls[rank] > 0 else 0.0 for rank in ranks}
    poor = max(shares, key=lambda rank: shares[rank])
    return MeasuredSteps(
        steps=tuple(steps),
        account=mean(list(ranks.values())),
        ranks=ranks,
        overlapped=mean_by_name([one.overlapped for one in resolved]),
        blame={rank: sum_by_rank([one.blame for one in ones], len(steps)) for rank, ones in by_rank.items()},
        wall_s=sum(walls.values()) / len(walls),
        closes=all(ranks[rank].closes(walls[rank], CLOSING_TOLERANCE) for rank in ranks),
        poor_rank=poor,
        poor_share=shares[poor],
    )


def mean_by_name(tables: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Name by name mean; a name that a table lacks counts as 0 there. Zero rows are left out."""
    total: dict[str, float] = {}
    for table in tables:
        for name, seconds in table.items():
            total[name] = total.get(name, 0.0) + seconds
    return {name: seconds / len(tables) for name, seconds in sorted(total.items()) if seconds > 0}


def sum_by_rank(tables: Sequence[Mapping[int, float]], steps: int) -> dict[int, float]:
    """Seconds per step waited for each culprit."""
    total: dict[int, float] = {}
    for table in tables:
        for culprit, seconds in table.items():
            total[culprit] = total.get(culprit, 0.0) + seconds
    return {culprit: seconds / steps for culprit, seconds in sorted(total.items())}


def unprofiled_step_s(metrics: Sequence[Metrics], profiled: Collection[int], attempt: int | None) -> float | None:
    """Median step time of the attempt's steps that were not profiled.

    The first step of an attempt warms caches and compiles, so it is left out when there are others.
    """
    own = [line for line in metrics if line.attempt == attempt]
    plain = [line.step_s for line in own if line.step not in profiled]
    first_is_plain = bool(own) and own[0].step not in profiled
    if first_is_plain and len(plain) > 1:
        plain = plain[1:]
    return median(plain) if plain else None


def poor_account(step: MeasuredSteps) -> str | None:
    """A plain sentence about a measurement that cannot be trusted, or None."""
    if step.poor_share > CLOSING_TOLERANCE:
        return (
            f"The step account does not close: {step.poor_share:.1%} of rank {step.poor_rank}'s step is in `other`, "
            f"above {CLOSING_TOLERANCE:.0%}, so the other buckets may miss as much."
        )
    if not step.closes:
        return "The step account does not close: on some rank its buckets do not sum to the step's wall time."
    return None


def slowed_by_profiling(profiled_s: float, step_s: float) -> str | None:
    """A sentence where the profiled steps are not like the others, so that nobody takes their seconds for the run's."""
    if abs(profiled_s / step_s - 1.0) <= ALIKE:
        return None
    times = f"Profiled steps took {seconds_text(profiled_s)}, the others {seconds_text(step_s)}"
    return f"{times}: the step account describes the profiled ones, so trust its shares more than its seconds."
