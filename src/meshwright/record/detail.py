"""What a profiled step tells beyond its account: its kernels, its process groups, and why the device was idle."""

from typing import Literal, get_args

import msgspec

from meshwright.account import Purpose

# Why the device ran out of work: the host had waited for the device itself (a synchronising call), was busy launching,
# was collecting garbage, or was in Python outside of any operator, where a trace does not say what it did.
HostCause = Literal["synchronize", "launch", "collect", "python"]
HOST_CAUSES: tuple[HostCause, ...] = get_args(HostCause)


class KernelGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Kernels of one purpose (on a CPU: operators): seconds in all, how many, and the one that took most of it."""

    purpose: str
    seconds: float
    count: int
    busiest: str


class GroupTransfers(msgspec.Struct, frozen=True, kw_only=True):
    """What one process group carried in the step for one purpose.

    group: its description, or its name where it has none. `exposed_s` holds transfer and waiting together, as a rank
    alone sees them. sent_bytes: of this rank's inputs; None where the trace does not say.
    """

    group: str
    ranks: tuple[int, ...]
    purpose: Purpose
    count: int
    sent_bytes: float | None
    exposed_s: float
    overlapped_s: float


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """A stretch in which the device was idle.

    start_s: from the step's begin. bucket: of the account, that the most of it was booked to. doing: what the host did
    for the most of it, as the trace names it. before: the kernel that ended it, "" where the step ended first.
    """

    start_s: float
    seconds: float
    bucket: str
    doing: str
    before: str


class StepDetail(msgspec.Struct, frozen=True, kw_only=True):
    """Of one rank's step. host: seconds of the `host` bucket by cause. gaps: the longest ones, longest first.

    launches: kernels that the host launched; kernel_s: mean seconds of one that computes.
    """

    kernels: tuple[KernelGroup, ...] = ()
    groups: tuple[GroupTransfers, ...] = ()
    gaps: tuple[Gap, ...] = ()
    host: dict[HostCause, float] = {}
    launches: int = 0
    kernel_s: float = 0.0
