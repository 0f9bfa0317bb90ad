"""What a step tells beyond its account, as tables of screen and page: kernels, process groups, idle gaps."""

from collections.abc import Iterable

import msgspec

from meshwright.explain import Advice, Explanation
from meshwright.explain.words import bytes_text, kernel_text, ranks_text
from meshwright.record import GroupTransfers, StepDetail
from meshwright.report.words import Unit, time_unit

# Less of a step than this prints as nothing, and is not worth a line.
WORTH_A_LINE = 0.001


class Grid(msgspec.Struct, frozen=True):
    """A table: words to the left, numbers to the right; what its numbers are stands under its title."""

    title: str
    under: str
    words: tuple[str, ...]
    numbers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def advice_text(advice: Advice) -> str:
    """What to do, why, and where to read more."""
    return f"{advice.what} {advice.evidence}. See docs/{advice.where}"


def grids(explanation: Explanation, most: int) -> Iterable[Grid]:
    """The tables that have rows, each of the first `most`."""
    detail, step = explanation.detail, explanation.step
    if detail is None or step is None:
        return
    cpu = explanation.program is not None and explanation.program.kind == "cpu"
    cpu = cpu or (explanation.job is not None and explanation.job.cluster.device.kind == "cpu")
    xla = explanation.program is not None and explanation.program.kind == "xla"
    unit, least = time_unit(step.wall_s), WORTH_A_LINE * step.wall_s
    for grid in (
        kernel_grid(detail, "operators" if cpu else "instructions" if xla else "kernels", unit, most, step.wall_s),
        group_grid(detail, unit, most, least),
        gap_grid(detail, unit, most, least),
    ):
        if grid.rows:
            yield grid


def kernel_grid(detail: StepDetail, things: str, unit: Unit, most: int, wall_s: float) -> Grid:
    """Kernels, or on a CPU operators, by purpose."""
    kept = [group for group in detail.kernels if group.seconds > WORTH_A_LINE * wall_s][:most]
    return Grid(
        f"{things.capitalize()} by purpose",
        "Mean of ranks and steps; what runs at the same time counts for each.",
        ("purpose", "the one that takes most"),
        (f"{unit.name} a step", "of a step", "count"),
        tuple(
            (
                group.purpose,
                kernel_text(group.busiest),
                figure(group.seconds, unit),
                f"{group.seconds / wall_s:.1%}",
                f"{group.count:,}",
            )
            for group in kept
        ),
    )


def group_grid(detail: StepDetail, unit: Unit, most: int, least: float) -> Grid:
    """What process groups carried, those that stood alone longest first."""
    kept = [group for group in detail.groups if group.exposed_s + group.overlapped_s > least][:most]
    return Grid(
        "Process groups",
        "Mean of ranks and steps; exposed holds waiting for the last rank too.",
        ("group", "purpose", "ranks"),
        ("transfers", "sent by each", f"exposed, {unit.name}", f"under compute, {unit.name}"),
        tuple(
            (
                group.group or "-",
                group.purpose,
                members(group),
                f"{group.count:,}",
                bytes_text(group.sent_bytes) if group.sent_bytes is not None else "-",
                figure(group.exposed_s, unit),
                figure(group.overlapped_s, unit),
            )
            for group in kept
        ),
    )


def gap_grid(detail: StepDetail, unit: Unit, most: int, least: float) -> Grid:
    """The longest stretches in which a device was idle."""
    kept = [gap for gap in detail.gaps if gap.seconds > least][:most]
    return Grid(
        "Longest idle gaps",
        "Of all ranks and steps, each kind of gap once.",
        ("bucket", "the host was in", "until"),
        (f"from, {unit.name}", f"idle, {unit.name}"),
        tuple(
            (
                gap.bucket,
                kernel_text(gap.doing) or "no operator",
                kernel_text(gap.before) or "the step's end",
                figure(gap.start_s, unit),
                figure(gap.seconds, unit),
            )
            for gap in kept
        ),
    )


def members(group: GroupTransfers) -> str:
    """The ranks of a group, or of one like it."""
    return ranks_text(group.ranks).partition(" ")[2] if group.ranks else "-"


def figure(seconds: float, unit: Unit) -> str:
    """Seconds in the table's unit."""
    return f"{seconds / unit.size:,.1f}"
