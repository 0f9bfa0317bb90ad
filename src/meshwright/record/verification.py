"""What a verification leaves in its folder: a layout held against one process, tensor by tensor, in a few sums each."""

import math
from pathlib import Path

import msgspec

from meshwright.spec import Job


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

    def relative(self, floor: float = 0.0) -> float:
        """Norm of the difference over the reference's, or over `floor` where that is larger: a true gradient may be
        zero (a key's bias has no effect on attention) and then all that is left is round-off."""
        if not math.isfinite(self.difference):
            return math.inf
        scale = max(math.sqrt(self.reference), floor)
        return math.sqrt(self.difference) / scale if scale else math.copysign(math.inf, self.difference or -1.0)

    @property
    def ratio(self) -> float:
        """The factor that brings the reference nearest to ours; nan where it is all zero."""
        return self.product / self.reference if self.reference else math.nan

    @property
    def cosine(self) -> float:
        """Of the angle between the two; nan where either is all zero."""
        lengths = math.sqrt(self.reference * self.ours)
        return self.product / lengths if lengths else math.nan


class RankReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank saw: its samples, its parts of modules' outputs and gradients in the first step, its parts of the
    weights after the last, and every step's loss and gradient norm. Modules stand in the order in which they ran.

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


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """Every step's loss and gradient norm in one process."""

    losses: list[float]
    norms: list[float]


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """A layout's run beside its reference.

    job: the one that both ran. reference: of one process in fp32. bound: relative differences up to here are round-off.
    angle: where the job's precision rounds, the largest 1 - cosine between one process's gradients in that precision
    and in fp32, over tensors and a few seeds; what a layout may show too. None: nothing is rounded.
    """

    job: Job
    bound: float
    angle: float | None = None
    reference: Reference
    ranks: list[RankReport]


def write_trial(path: Path, trial: Trial) -> None:
    """One JSON file."""
    path.write_bytes(msgspec.json.encode(trial))


def read_trial(path: Path) -> Trial:
    """What write_trial wrote."""
    return msgspec.json.decode(path.read_bytes(), type=Trial)
