"""A calibrated cluster as a file that people read, and jobs take as it is."""

import msgspec
import tomli_w

from meshwright.record.calibration import Calibration, Figure
from meshwright.spec import Cluster
from meshwright.spec.decode import without_none

COLUMNS = ("work", "sizes", "ranks", "seconds", "spread", "repeats")


def cluster_toml(cluster: Cluster, calibration: Calibration) -> str:
    """The [cluster] section, and as comments every figure that it was made of."""
    measured = cluster.measured
    assert measured is not None
    with_what = [f"PyTorch {measured.torch}"]
    with_what += [f"CUDA {measured.cuda}"] if measured.cuda else []
    with_what += [f"NCCL {measured.nccl}"] if measured.nccl else []
    head = [
        f"{cluster.label()}, calibrated on {measured.date}: {measured.device}, {', '.join(with_what)}.",
        "Plan with it: meshwright plan JOB.toml --cluster THIS_FILE, or copy it into a job in the place of [cluster].",
        "cluster.rates: docs/calibrating.md says what each means. cluster.measured.spread: of each, what lies between",
        "the 10th and the 90th hundredth of its repeats, over their median; misfit: how far a measured size is at most",
        "from what the plan reckons of it. Rates that have no spread are built-in ones. Every figure is at the end.",
    ]
    section = without_none(msgspec.to_builtins(cluster))
    # There are no nodes that are not alike, and no versions of what was not there.
    section["measured"] = {name: value for name, value in section["measured"].items() if value != ""}
    table = tomli_w.dumps({"cluster": {name: value for name, value in section.items() if name != "groups"}})
    tail = [f"not measured: {line}" for line in calibration.missing]
    return "".join([*comments(head), "\n", table, "\n", *comments([*tail, *figure_lines(calibration.figures)])])


def comments(lines: list[str]) -> list[str]:
    """Each line as a comment."""
    return [f"# {line}".rstrip() + "\n" for line in lines]


def figure_lines(figures: tuple[Figure, ...]) -> list[str]:
    """All figures in columns."""
    rows = [COLUMNS, *(figure_cells(figure) for figure in figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def figure_cells(figure: Figure) -> tuple[str, ...]:
    """One figure's."""
    ranks = f"{figure.ranks} ({figure.place})" if figure.place else str(figure.ranks)
    sizes = " x ".join(map(str, figure.sizes))
    if figure.place is not None:
        sizes += " bytes"
    return (figure.work, sizes, ranks, f"{figure.seconds:.3e}", f"{figure.spread:.0%}", str(figure.repeats))
