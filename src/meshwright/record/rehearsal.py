"""A rehearsal: one rank of a layout run by itself. What it is asked, and what it found."""

from bisect import bisect_right
from pathlib import Path
from typing import Literal

import msgspec

from meshwright.account import MemoryAccount, StepAccount
from meshwright.spec import Layout, ModelSpec, SettingError

# What ranks of a group do together, or two of them: "pass" is each rank's part to the next of a ring. What is received
# takes no time by itself, and has no curve.
Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "pass", "send", "recv"]
# (bytes, seconds), by bytes. Of the first three kinds the bytes are those of the whole, else of what a rank sends.
Curve = tuple[tuple[float, float], ...]


class GroupPace(msgspec.Struct, frozen=True, kw_only=True):
    """How long transfers among these ranks are predicted to take, by kind. ranks: of the world, sorted."""

    ranks: tuple[int, ...]
    curves: dict[Kind, Curve]


class RehearsalTask(msgspec.Struct, frozen=True, kw_only=True):
    """What the process that rehearses is asked beside the job. paces: of every group that the rank is in."""

    rank: int
    steps: int
    paces: tuple[GroupPace, ...]


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """The transfers of one kind that a rank asked of a group of `ranks` ranks in one step.

    size_bytes, seconds: of all of them; bytes as a Curve counts them, seconds as predicted.
    """

    kind: Kind
    ranks: int
    count: int
    size_bytes: float
    seconds: float


class Rehearsed(msgspec.Struct, frozen=True, kw_only=True):
    """What the rank's process found beside its events. steps_s: of each step, seconds. asked: in the last one."""

    steps_s: tuple[float, ...]
    asked: tuple[Asked, ...]


class Rehearsal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A rank's rehearsal, beside what was predicted for that rank.

    device: that it ran on. step_s: median of the steps that were not profiled. predicted, measured: the rank's step,
    of which transfers are predictions in both; waiting for other ranks, and for what they send, is in neither.
    """

    model: ModelSpec
    layout: Layout
    sequence: int
    global_batch: int
    device: str
    rank: int
    steps: int
    step_s: float
    predicted: StepAccount
    predicted_memory: MemoryAccount
    measured: StepAccount
    overlapped: dict[str, float]
    memory: MemoryAccount
    asked: tuple[Asked, ...]


def seconds_at(curve: Curve, size_bytes: float) -> float:
    """What a curve says of this many bytes: straight between its points, and on beyond the last."""
    at = min(max(1, bisect_right(curve, size_bytes, key=lambda point: point[0])), len(curve) - 1)
    (before, before_s), (after, after_s) = curve[at - 1], curve[at]
    return before_s + (after_s - before_s) * (size_bytes - before) / (after - before)


def read_rehearsal(path: Path) -> Rehearsal:
    """A rehearsal's file. Raises SettingError where it is none."""
    nearest = "a file that meshwright rehearse wrote"
    try:
        return msgspec.json.decode(path.read_bytes(), type=Rehearsal)
    except OSError as error:
        raise SettingError(f"--rehearsed {path}", f"cannot be read ({error.strerror})", nearest) from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise SettingError(f"--rehearsed {path}", f"holds no rehearsal ({error})", nearest) from None
