"""What explain finds out about a run, as one frozen type that reports draw and JSON carries."""

import msgspec

from meshwright.account import MemoryAccount, RunAccount, StepAccount
from meshwright.record import Evaluation, Metrics, Prediction, Program, StepDetail
from meshwright.spec import Job


class MeasuredSteps(msgspec.Struct, frozen=True, kw_only=True):
    """The profiled steps of one attempt, their waits separated from transfers.

    account: mean over steps and ranks. ranks: each rank's mean over steps. overlapped: transfer hidden under compute,
    by purpose, mean over steps and ranks, not part of the account. blame[rank][culprit]: seconds per step that `rank`
    waited for `culprit`. poor_rank: the rank with the largest share in `other`.
    """

    steps: tuple[int, ...]
    account: StepAccount
    ranks: dict[int, StepAccount]
    overlapped: dict[str, float]
    blame: dict[int, dict[int, float]]
    wall_s: float
    closes: bool
    poor_rank: int
    poor_share: float

    def waited_for(self) -> dict[int, float]:
        """Seconds per step that all ranks together waited for each rank, the most waited for first."""
        seconds: dict[int, float] = {}
        for waits in self.blame.values():
            for culprit, waited in waits.items():
                seconds[culprit] = seconds.get(culprit, 0.0) + waited
        return dict(sorted(seconds.items(), key=lambda item: -item[1]))

    def longest_wait_for(self, culprit: int) -> float:
        """Seconds per step that the rank which `culprit` held up most lost to it: what a step would gain at most."""
        return max((waits.get(culprit, 0.0) for waits in self.blame.values()), default=0.0)


class MemoryComparison(msgspec.Struct, frozen=True, kw_only=True):
    """Peak memory of the fullest rank, bytes; `rank` is the one measured."""

    predicted: MemoryAccount | None
    measured: MemoryAccount | None
    rank: int | None
    ranks: dict[int, MemoryAccount]


class RunLife(msgspec.Struct, frozen=True, kw_only=True):
    """Device-seconds over all attempts. yield_: useful over paid; None where no datasheet peak says what is useful."""

    account: RunAccount
    yield_: float | None = msgspec.field(name="yield")
    statistical_efficiency: str = "not measurable here"


class RankFault(msgspec.Struct, frozen=True, kw_only=True):
    """Something that went wrong, with the attempt and rank that reported it."""

    attempt: int
    rank: int
    step: int
    what: str


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """A plain sentence about the run, and the numbers that it rests on."""

    what: str
    evidence: str


class Advice(msgspec.Struct, frozen=True, kw_only=True):
    """A cause of lost time, and what to do about it.

    cause: one word or two, the same in every run (input, synchronize, launch, straggler, ...; `unexplained` where time
    is lost and nothing says why). gain_s: seconds of each step that it would save, at most; None where it cannot be
    told. where: the page and heading of the documentation.
    """

    cause: str
    what: str
    evidence: str
    gain_s: float | None
    where: str


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """A run, read back. `notes` say what could not be measured and why; what is None was not there to be read.

    attempt: the newest, which `prediction`, `step`, `memory` and `ending` describe. ranks: those that wrote events in
    it. difference: predicted minus measured, bucket by bucket. step_s: the median of the steps that were not profiled.
    program: in place of a job, where another trainer recorded the run. detail: mean over profiled steps and ranks; its
    gaps are the longest of all, of those alike the longest. advice: what would gain most first. traces: the files it
    was read from, by rank, where it is no run.
    """

    path: str
    name: str
    job: Job | None
    job_toml: str
    attempts: int
    attempt: int | None
    world_size: int
    ranks: tuple[int, ...]
    missing_ranks: tuple[int, ...]
    ending: str
    metrics: tuple[Metrics, ...]
    evaluations: tuple[Evaluation, ...]
    prediction: Prediction | None
    step: MeasuredSteps | None
    difference: StepAccount | None
    step_s: float | None
    memory: MemoryComparison
    life: RunLife
    faults: tuple[RankFault, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    program: Program | None = None
    detail: StepDetail | None = None
    advice: tuple[Advice, ...] = ()
    traces: tuple[str, ...] = ()
