"""What the profiled steps of all ranks tell beyond their accounts, as one."""

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from meshwright.record import GroupTransfers, HostCause, KernelGroup, StepDetail

T = TypeVar("T")

# Idle stretches that are kept of all ranks and steps.
LONGEST_GAPS = 10


def mean_detail(details: Sequence[StepDetail]) -> StepDetail | None:
    """Mean over steps and ranks, what a step lacks counted as 0; the longest gaps of all. None for none."""
    if not details:
        return None
    steps = len(details)
    host: dict[HostCause, float] = {}
    for detail in details:
        for cause, seconds in detail.host.items():
            host[cause] = host.get(cause, 0.0) + seconds / steps
    kernels = gathered([group for detail in details for group in detail.kernels], lambda group: group.purpose)
    groups = gathered([group for detail in details for group in detail.groups], lambda g: (g.group, g.purpose))
    longest = sorted((gap for detail in details for gap in detail.gaps), key=lambda gap: -gap.seconds)
    # One cause makes the same gap in every step and on every rank: the longest of these stands for all.
    gaps = list({(gap.bucket, gap.doing, gap.before): gap for gap in reversed(longest)}.values())
    gaps.sort(key=lambda gap: -gap.seconds)
    launches = sum(detail.launches for detail in details)
    # A step of more kernels says more of the mean one.
    kernel_s = sum(detail.kernel_s * detail.launches for detail in details) / launches if launches else 0.0
    return StepDetail(
        kernels=tuple(sorted((mean_kernels(same, steps) for same in kernels), key=lambda group: -group.seconds)),
        groups=tuple(sorted((mean_transfers(same, steps) for same in groups), key=lambda group: -group.exposed_s)),
        gaps=tuple(gaps[:LONGEST_GAPS]),
        host=host,
        launches=round(launches / steps),
        kernel_s=kernel_s,
    )


def gathered(things: Sequence[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Things of the same key together."""
    found: dict[Hashable, list[T]] = {}
    for thing in things:
        found.setdefault(key(thing), []).append(thing)
    return list(found.values())


def mean_kernels(same: Sequence[KernelGroup], steps: int) -> KernelGroup:
    """Kernels of one purpose in a mean step, with the busiest of the step where they took longest."""
    return KernelGroup(
        purpose=same[0].purpose,
        seconds=sum(group.seconds for group in same) / steps,
        count=round(sum(group.count for group in same) / steps),
        busiest=max(same, key=lambda group: group.seconds).busiest,
    )


def mean_transfers(same: Sequence[GroupTransfers], steps: int) -> GroupTransfers:
    """What groups of one description carried for one purpose in a mean step; the ranks of the one exposed longest."""
    sent = [group.sent_bytes for group in same]
    known = [size for size in sent if size is not None]
    return GroupTransfers(
        group=same[0].group,
        ranks=max(same, key=lambda group: group.exposed_s).ranks,
        purpose=same[0].purpose,
        count=round(sum(group.count for group in same) / steps),
        sent_bytes=sum(known) / steps if len(known) == len(sent) else None,
        exposed_s=sum(group.exposed_s for group in same) / steps,
        overlapped_s=sum(group.overlapped_s for group in same) / steps,
    )
