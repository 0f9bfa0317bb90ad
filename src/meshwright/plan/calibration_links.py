"""What was measured of transfers: each link's bandwidth and latency, and what compute loses beside one."""

import msgspec

from meshwright.plan.fitting import DIGITS, Fit, fit_line, rounded
from meshwright.record.calibration import Figure, Place
from meshwright.spec import Collective, Link

# Of which a link's own figures are said; the other collectives are shares of it. A CPU's built-in links are those of
# an all-reduce, a GPU's bandwidth is its datasheet's.
KINDS: tuple[Collective, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")
LEAST_LATENCY_S = 1e-7
LEAST_BYTES_PER_S = 1.0


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes a second around a ring, and seconds of a round, that a collective's sizes amount to."""

    bytes_per_s: float
    latency_s: float
    misfit: float


def fit_links(fit: Fit) -> Fit:
    """The link inside a node, and between nodes; both with the same shares by kind."""
    inside, across = lines_of(fit, "node"), lines_of(fit, "across")
    if not inside and not across:
        return fit
    source = f"measured on {fit.date}"
    lines, name = (inside, "intra") if inside else (across, "inter")
    link: Link = getattr(fit.cluster, name)
    first = lines["all_reduce" if fit.cluster.device.kind == "cpu" else "all_gather"]
    bandwidth = first.bytes_per_s if fit.cluster.device.kind == "cpu" else link.bytes_per_s
    said = source if fit.cluster.device.kind == "cpu" else f"{link.source}; latency {source}"
    link = msgspec.structs.replace(
        link, bytes_per_s=rounded(bandwidth, DIGITS), latency_s=rounded(first.latency_s, DIGITS), source=said
    )
    shares = {kind: line.bytes_per_s / link.bytes_per_s for kind, line in lines.items()}
    latencies = {kind: line.latency_s / link.latency_s for kind, line in lines.items()}
    fit = fit.placed(**{name: link})
    if fit.cluster.nodes == 1:
        # No more nodes than one: what is said of the links between them must only be no faster.
        fit = fit.placed(inter=link) if fit.cluster.device.kind == "cpu" else fit
    elif inside and across:
        gather = across["all_gather"]
        inter = msgspec.structs.replace(
            fit.cluster.inter,
            bytes_per_s=rounded(gather.bytes_per_s / shares["all_gather"], DIGITS),
            latency_s=rounded(gather.latency_s / max(latencies["all_gather"], 1e-3), DIGITS),
            source=source,
        )
        fit = fit.placed(inter=inter)
    figures = [figure for kind in KINDS for figure in fit.of(kind)]
    misfit = max(line.misfit for line in lines.values())
    return fit.with_rates("links", figures, misfit, links=shares, latencies=latencies)


def lines_of(fit: Fit, place: Place) -> dict[Collective, Line]:
    """Of every kind in one placement; none where it was not measured."""
    found: dict[Collective, list[Figure]] = {}
    for kind in KINDS:
        found[kind] = [figure for figure in fit.of(kind) if figure.place == place]
    return {kind: fit_collective(kind, figures) for kind, figures in found.items() if figures}


def fit_collective(kind: Collective, figures: list[Figure]) -> Line:
    """The line through one kind's sizes, as plan/collective.py reckons with it."""
    ranks = figures[0].ranks
    rounds = {"all_reduce": 2 * (ranks - 1), "all_to_all": 1, "send": 1}.get(kind, ranks - 1)
    moved = {"all_reduce": 2 * (ranks - 1) / ranks, "send": 1.0}.get(kind, (ranks - 1) / ranks)
    sizes, seconds = [float(figure.sizes[0]) for figure in figures], [figure.seconds for figure in figures]
    start_s, byte_s = fit_line(sizes, seconds)
    misfit = max(abs((start_s + byte_s * size) / second - 1) for size, second in zip(sizes, seconds, strict=True))
    # A line without a slope is one of sizes that all took as long: no faster than the largest of them, then.
    byte_s = byte_s or seconds[-1] / sizes[-1]
    return Line(
        bytes_per_s=max(LEAST_BYTES_PER_S, moved / byte_s),
        latency_s=max(LEAST_LATENCY_S, start_s / rounds),
        misfit=misfit,
    )


def fit_contention(fit: Fit) -> Fit:
    """Of the seconds that transfers run beside compute, what compute takes longer. None where they do not."""
    alone, together, gather = (fit.of(f"beside.{name}") for name in ("alone", "together", "gather"))
    if not together or not fit.rates.overlaps:
        return fit
    beside_s = min(together[0].seconds, gather[0].seconds)
    share = max(0.0, together[0].seconds - alone[0].seconds) / beside_s
    return fit.with_rates("contention", [*alone, *together], None, contention=share)
