"""What a verification leaves in its folder: a layout held against one process, tensor by tensor, in a few sums each."""

import math
from pathlib import Path

import msgspec

from meshwright.record.folder import RunFolder
from meshwright.spec import Job

# A tensor's difference counts against this share of all of its kind where its own norm is smaller: a true gradient may
# be zero (a key's bias has no effect on attention) and then all that is left is round-off.
SMALLEST_SHARE = 1e-4
# What attention mixes stands among the outputs of its modules by this name.
ATTEND = "attend"


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Parts of one tensor against the same parts of the reference: sums over elements, which add up over parts.

    difference: of the squared differences. reference, ours: of the squares. product: of the products of the two.
    elements: how many were compared, copies on several ranks counted each.
    """

    difference: float = 0.0
    reference: float = 0.0
    ours: float = 0.0
    product: float = 0.0
    elements: int = 0

    def __add__(self, other: "Comparison") -> "Comparison":
        return Comparison(**{name: getattr(self, name) + getattr(other, name) for name in self.__struct_fields__})

    @property
    def finite(self) -> bool:
        """Whether no element is nan or inf."""
        return math.isfinite(self.difference)

    def relative(self, floor: float = 0.0) -> float:
        """Norm of the difference over the reference's, or over `floor` where that is larger."""
        if not self.finite:
            return math.inf
        scale = max(math.sqrt(self.reference), floor)
        if self.difference == 0:
            return 0.0
        return math.sqrt(self.difference) / scale if scale else math.inf

    def factor(self, spread: float) -> float | None:
        """The factor that the reference is off by, if what it leaves unexplained is below `spread` of ours."""
        if not self.finite or not self.ours or not self.reference:
            return None
        left = max(0.0, self.ours - self.product * self.product / self.reference)
        return self.product / self.reference if math.sqrt(left / self.ours) < spread else None


def relative_differences(tensors: dict[str, Comparison]) -> dict[str, float]:
    """Of each tensor of one kind."""
    floor = SMALLEST_SHARE * math.sqrt(sum(part.reference for part in tensors.values()))
    return {name: part.relative(floor) for name, part in tensors.items()}


class RankReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank saw: its samples, its parts of modules' outputs and gradients in the first step, its parts of the
    weights after the last, and every step's loss and gradient norm.

    foreign: of its samples, the first whose tokens are not those of its index in the global batch; -1: none.
    misplaced: of its tokens of a sample, the first whose place is not the one it has in the sequence; -1: none.
    """

    rank: int
    foreign: int
    misplaced: int = -1
    outputs: dict[str, Comparison]
    gradients: dict[str, Comparison]
    weights: dict[str, Comparison]
    losses: list[float]
    norms: list[float]


class Rounding(msgspec.Struct, frozen=True, kw_only=True):
    """How far a precision takes one process from fp32: the largest relative differences over a few seeds, and over
    steps; gradients in the first step, by name."""

    loss: float
    norm: float
    gradients: dict[str, float]


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """One process in fp32: every step's loss and gradient norm, and what there is to compare, elements by name.

    Modules stand in the order in which they ran. counted: targets of the first step that count. rounding: of the job's
    precision; None in fp32.
    """

    losses: list[float]
    norms: list[float]
    counted: int
    outputs: dict[str, int]
    gradients: dict[str, int]
    weights: dict[str, int]
    rounding: Rounding | None


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """A layout's run beside its reference.

    job: the one that both ran. bound: relative differences up to here are round-off in fp32.
    unverified: settings of the user's job that the small one could not keep, each with why.
    """

    job: Job
    bound: float
    reference: Reference
    ranks: list[RankReport]
    unverified: tuple[str, ...] = ()


# Files are MessagePack: JSON has no word for nan and inf, and those are what a broken layout may give.


def write_report(folder: RunFolder, report: RankReport) -> None:
    """What a rank leaves for the process that started it."""
    report_path(folder, report.rank).write_bytes(msgspec.msgpack.encode(report))


def read_reports(folder: RunFolder, ranks: int) -> list[RankReport]:
    """What all ranks left."""
    paths = (report_path(folder, rank) for rank in range(ranks))
    return [msgspec.msgpack.decode(path.read_bytes(), type=RankReport) for path in paths]


def report_path(folder: RunFolder, rank: int) -> Path:
    """Where a rank leaves what it saw."""
    return folder.path / f"rank-{rank}.msgpack"


def write_trial(folder: RunFolder, trial: Trial) -> None:
    """One file."""
    trial_path(folder).write_bytes(msgspec.msgpack.encode(trial))


def read_trial(folder: RunFolder) -> Trial:
    """What write_trial wrote."""
    return msgspec.msgpack.decode(trial_path(folder).read_bytes(), type=Trial)


def trial_path(folder: RunFolder) -> Path:
    """Where the trial is."""
    return folder.path / "trial.msgpack"
