"""What advice is drawn from: the profiled steps of a run with their losses, and what is known of its device and job."""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Literal

import msgspec

from meshwright.account import MemoryAccount, StepAccount, mean
from meshwright.explain.details import mean_detail
from meshwright.explain.explanation import Advice
from meshwright.explain.lateness import Losses, Seconds, losses_of
from meshwright.explain.steps import RankStep
from meshwright.explain.words import kernel_text, of_step, ranks_text, seconds_text
from meshwright.record import Gap, StepDetail
from meshwright.spec import Device, Job

# A rank that loses less than this share of what the worst one does is not named with it.
AS_MUCH = 0.5
# Idle stretches that evidence names.
NAMED_GAPS = 2


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One run. account, detail: means over its steps and ranks. memory: the fullest rank's. device: None where neither
    the record nor the hardware table knows it. precision: of most matrix products, where it is known. jax: the program
    is of JAX, whose cures have other names than PyTorch's. profiling_s: how much longer the profiled steps took than
    the others, where these are known.
    """

    steps: list[list[RankStep]]
    losses: list[Losses]
    account: StepAccount
    detail: StepDetail
    wall_s: float
    kind: str
    device: Device | None
    precision: str | None
    memory: MemoryAccount | None
    job: Job | None
    jax: bool
    pipeline: bool
    profiling_s: float

    def gain(self, cause: str) -> float:
        """Seconds of a step that a cause costs at most, mean over steps."""
        return fmean(losses.gain(cause) for losses in self.losses)

    def gain_of(self, seconds: Callable[[RankStep], float]) -> float:
        """The same of some seconds of each rank's step that are no cause by themselves."""
        return fmean(
            losses.gain_of({one.resolved.rank: seconds(one) for one in ranks}, {}, fault=False)
            for losses, ranks in zip(self.losses, self.steps, strict=True)
        )

    def lost_by(self, cause: str) -> Seconds:
        """Seconds of a step that each rank itself loses, mean over steps."""
        return {rank: fmean(losses.own[cause][rank] for losses in self.losses) for rank in self.losses[0].kept}


def build_case(
    steps: list[list[RankStep]],
    *,
    kind: str,
    device: Device | None = None,
    precision: str | None = None,
    memory: MemoryAccount | None = None,
    job: Job | None = None,
    jax: bool = False,
    step_s: float | None = None,
) -> Case:
    """The case of profiled steps, of which there is at least one. step_s: of the steps that were not profiled."""
    ones = [one for ranks in steps for one in ranks]
    detail = mean_detail([one.detail for one in ones if one.detail is not None])
    wall_s = fmean(one.resolved.wall_s for one in ones)
    return Case(
        steps=steps,
        losses=[losses_of(ranks, kind, alike=jax) for ranks in steps],
        account=mean([one.resolved.account for one in ones]),
        detail=detail or StepDetail(),
        wall_s=wall_s,
        kind=kind,
        device=device,
        precision=precision,
        memory=memory,
        job=job,
        jax=jax,
        profiling_s=max(0.0, wall_s - step_s) if step_s else 0.0,
        pipeline=any("pipeline" in one.resolved.waited or one.resolved.account.comm_pipeline > 0 for one in ones),
    )


def has_details(steps: Sequence[Sequence[RankStep]]) -> bool:
    """Whether any step says more than its account."""
    return any(one.detail is not None for ranks in steps for one in ranks)


def advise(case: Case, cause: str, gain_s: float | None, what: str, *evidence: str) -> Advice:
    """An advice, with its size first in its evidence and its heading in the documentation."""
    size = [of_step(gain_s, case.wall_s)] if gain_s is not None else []
    said = "; ".join([*size, *(words for words in evidence if words)])
    return Advice(cause=cause, what=what, evidence=said, gain_s=gain_s, where=f"advice.md#{cause.replace(' ', '-')}")


def worst_ranks(lost: Seconds) -> list[int]:
    """The ranks that lose about as much as the worst one; none where all do."""
    most = max(lost.values())
    worst = [rank for rank, seconds in lost.items() if seconds > AS_MUCH * most]
    return worst if len(worst) < len(lost) else []


def on_ranks(lost: Seconds) -> str:
    """ " on rank 1", where a few ranks lose most of it."""
    worst = worst_ranks(lost)
    return f" on {ranks_text(worst)}" if worst else ""


def compared(lost: Seconds) -> str:
    """How much the worst ranks lose, and the others; empty where all lose about the same."""
    worst = worst_ranks(lost)
    if not worst:
        return ""
    rest = max(seconds for rank, seconds in lost.items() if rank not in worst)
    most = max(lost.values())
    return f"{seconds_text(most)} on {ranks_text(worst)}, {seconds_text(rest)} at most on the others"


def idle_words(gaps: Sequence[Gap], buckets: Sequence[Literal["host", "input", "checkpoint", "other"]]) -> str:
    """The longest idle stretches of some buckets, and what the host did in them."""
    longest = [gap for gap in gaps if gap.bucket in buckets][:NAMED_GAPS]
    words = [
        f"{seconds_text(gap.seconds)} in {kernel_text(gap.doing) or 'no operator'}"
        + (f" before {kernel_text(gap.before)}" if gap.before else "")
        for gap in longest
    ]
    return f"idle longest: {', '.join(words)}" if words else ""
