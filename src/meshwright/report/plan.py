"""A plan as one screen of text, and as JSON."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from meshwright.account import MEANINGS
from meshwright.plan import Decision, Offer, Plan, Rejected
from meshwright.plan.cost import DAY_S, HOUR_S, Cost, Costs, three_figures
from meshwright.plan.curve import KNEE
from meshwright.plan.decision import days_text
from meshwright.plan.fit import SPARE
from meshwright.record import Prediction
from meshwright.report.text import beside, blocks_held, labelled, show

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# Rows of the ranking and of the rejections on the screen; JSON has more.
LISTED_LAYOUTS = 10
LISTED_REJECTIONS = 6
BAR_CELLS = 20
# From here on days are easier to read than seconds.
LONG_S = 2 * DAY_S
# More devices than these in one node are seldom meant.
USUAL_NODE = 8
# Buckets below this share of the step are summed into one line.
SMALL = 0.005

MEMORY_WORDS = {"optimizer_states": "optimizer states", "communication_buffers": "communication buffers"}


def plan_json(plan: Plan) -> str:
    """The whole plan as JSON."""
    return msgspec.json.format(msgspec.json.encode(plan)).decode()


def decision_json(decision: Decision) -> str:
    """The whole comparison as JSON."""
    return msgspec.json.format(msgspec.json.encode(decision)).decode()


def decision_text(decision: Decision, console: "Console") -> None:
    """Print the offers side by side, and which to take."""
    numbers = ["devices", "batch", "step", "80% interval", "tokens/s", "days", "cost", "1M tokens", "kept"]
    table = new_table(["offer"], numbers)
    for offer in decision.offers:
        table.add_row(*offer_cells(offer), style="bold" if offer.name == decision.taken else "")
    layouts = [(o.name, o.best.layout.label() if o.best is not None else "nothing fits") for o in decision.offers]
    lines = [("Decision" if not number else "", line) for number, line in enumerate(decision.lines)]
    show([table, labelled(layouts), labelled(lines)], console)


def offer_cells(offer: Offer) -> list[str]:
    """A row of the comparison; what nobody said, a price or a number of tokens, leaves its cells empty."""
    best, found = offer.best, offer.interruptions
    if best is None or found is None:
        return [offer.name, f"{offer.devices:,}"]
    low_s, high_s = best.step_interval_s
    return [
        offer.name,
        f"{offer.devices:,}",
        f"{offer.global_batch:,}",
        seconds_text(best.step_s),
        f"{seconds_text(low_s)} - {seconds_text(high_s)}",
        f"{offer.tokens_per_s:,.0f}",
        days_text(offer.days[1]) if offer.days else "",
        three_figures(offer.cost[1]) if offer.cost else "",
        three_figures(offer.million_tokens) if offer.million_tokens is not None else "",
        f"{found.productive:.1%}",
    ]


def plan_text(plan: Plan, console: "Console") -> None:
    """Print the verdict, the job's own layout in detail, the ranking and the rejections."""
    own = job_table(plan, console)
    parts = [headline(plan), own, ranking(plan), scaling(plan), rejections(plan.rejected), notes(plan.job)]
    show([part for part in parts if part is not None], console)


def headline(plan: Plan) -> "Table":
    """What is planned, and the verdict."""
    tokens = plan.global_batch * plan.sequence
    node = "1 node of " if plan.cluster.nodes == 1 and plan.cluster.devices > USUAL_NODE else ""
    what = f"{plan.model} on {node}{plan.cluster.label()}: {plan.global_batch:,} sequences of {plan.sequence:,} tokens"
    rows = [("Plan", f"{what}, {tokens:,} tokens a step"), ("Verdict", plan.verdict)]
    return labelled([*rows, *cost_rows(plan.costs, plan.goal.objective, fits=plan.job_fits)])


def cost_rows(costs: Costs | None, objective: str, *, fits: bool) -> list[tuple[str, str]]:
    """What the job's layout costs and how long its tokens take; the same of better layouts."""
    if costs is None:
        return []
    first = "the best" if objective == "fewest" else "the fastest"
    named = [(first, costs.first), ("the cheapest", costs.cheapest)]
    if objective == "cheapest":
        named = [("the cheapest", costs.first)]
    elif costs.first == costs.cheapest:
        named = [(f"{first} and cheapest", costs.first)]
    lines = [f"this job{'' if fits else ', which does not fit'}: {cost_text(costs.own, costs.tokens)}"]
    for word, cost in named:
        if cost is not None and cost.layout != costs.own.layout:
            lines.append(f"{word}, {cost.layout.label()}: {cost_text(cost, costs.tokens)}")
    title = "Time" if costs.own.step is None else "Cost"
    return [("" if number else title, line) for number, line in enumerate(lines)]


def cost_text(cost: Cost, tokens: int | None) -> str:
    """A layout's price and time in a few words."""
    words: list[str] = []
    if cost.step is not None and cost.million_tokens is not None:
        words = [f"{three_figures(cost.step)} a step", f"{three_figures(cost.million_tokens)} a million tokens"]
    if cost.run_s is not None:
        price = f"{three_figures(cost.run)} and " if cost.run is not None else ""
        words.append(f"{price}{long_text(cost.run_s)} for {tokens:,} tokens")
    return ", ".join(words)


def long_text(seconds: float) -> str:
    """Seconds, hours or days."""
    if seconds < HOUR_S:
        return seconds_text(seconds)
    return f"{seconds / HOUR_S:.3g} hours" if seconds < LONG_S else seconds_text(seconds)


def job_table(plan: Plan, console: "Console") -> "Table":
    """The job's own layout: its step by bucket, largest first, beside its memory by term."""
    return titled(own_title(plan), beside(step_table(plan.job), memory_table(plan), console))


def own_title(plan: Plan) -> str:
    """The job's own layout, and whether it fits."""
    note = "" if plan.job_fits else " (does not fit)"
    if plan.job_fits and plan.job.memory.total() > (1 - SPARE) * plan.capacity_bytes:
        note = f" (less than {SPARE:.0%} would stay free: nothing as full is offered)"
    return f"This job: {plan.job.layout.label()}{note}"


def titled(title: str, inner: "Table") -> "Table":
    """A title over something, both to the left."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid()
    grid.add_row(Text(title, style="bold"))
    grid.add_row(inner)
    return grid


def step_table(prediction: Prediction) -> "Table":
    """Seconds and share of every bucket."""
    table = new_table([f"step {seconds_text(prediction.step_s)}"], ["time", "share", ""], wrap=False)
    rows = sorted(prediction.step.rows(), key=lambda row: -row[1])
    large = [(n, s) for n, s in rows if s > SMALL * prediction.step_s and s]
    small_s = sum(s for _, s in rows) - sum(s for _, s in large)
    for name, seconds in large:
        share = seconds / prediction.step_s
        table.add_row(name, seconds_text(seconds), f"{share:.1%}", bar(share))
    if small_s > 0:
        table.add_row("the other buckets", seconds_text(small_s), f"{small_s / prediction.step_s:.1%}", "")
    if prediction.step_s:
        table.add_row("80% interval", *map(seconds_text, prediction.step_interval_s), style="bold")
    for purpose, seconds in prediction.overlapped.items():
        table.add_row(f"({purpose}, hidden)", seconds_text(seconds), "", "", style="dim")
    return table


def memory_table(plan: Plan) -> "Table":
    """Bytes of every term against the device's capacity."""
    memory, capacity_bytes = plan.job.memory, plan.capacity_bytes
    total_bytes = memory.total()
    table = new_table([f"memory {gb(total_bytes)} of {gb(capacity_bytes)}"], ["bytes", "of device"], wrap=False)
    for name, size_bytes in sorted(memory.rows(), key=lambda row: -row[1]):
        if size_bytes:
            table.add_row(MEMORY_WORDS.get(name, name), gb(size_bytes), f"{size_bytes / capacity_bytes:.1%}")
    left_bytes = capacity_bytes - total_bytes
    word = "left" if left_bytes >= 0 else "missing"
    table.add_row(word, gb(abs(left_bytes)), f"{abs(left_bytes) / capacity_bytes:.1%}", style="bold")
    table.add_row("80% interval", *map(gb, plan.job.memory_interval_bytes), style="bold")
    return table


def ranking(plan: Plan) -> "Table | None":
    """The fastest layouts that fit; the job's own is marked."""
    if not plan.ranked:
        return None
    fastest = plan.ranked[:LISTED_LAYOUTS]
    shown = [p for place, p in enumerate(plan.ranked) if place < LISTED_LAYOUTS or leads(plan.ranked, place)]
    best = "Cheapest" if plan.goal.objective == "cheapest" else "Fastest"
    order = f"{best if fastest[0].step_s else 'First'} {len(fastest)}"
    others = ", and one with each other axis" if len(shown) > len(fastest) else ""
    sizes = {p.layout.world_size for p in plan.ranked}
    # Looked for on the fewest alone.
    which = f"on {min(sizes)} devices" if plan.goal.objective == "fewest" and len(sizes) == 1 else "of all that fit"
    title = f"{order} {which} (within 1%: the simpler first; {plan.considered} had to be predicted){others}"
    table = new_table(["", "layout"], ["zero", "micro", "recompute", "ranks", "step", "tokens/s", "MFU", "memory"])
    for prediction in shown:
        own = prediction.layout == plan.job.layout
        table.add_row(
            f"{plan.ranked.index(prediction) + 1}", *layout_cells(prediction, own=own), style="bold" if own else ""
        )
    if plan.job_fits and all(p.layout != plan.job.layout for p in shown):
        table.add_row("...", *layout_cells(plan.job, own=True), style="bold")
    return titled(title, table)


def scaling(plan: Plan) -> "Table | None":
    """Speed and efficiency against the number of devices, and what a noise scale says of the batch."""
    curve = plan.curve
    if curve is None or not curve.points:
        return None
    columns = ["step", "from", "to", "tokens/s", "efficiency", "device-s a million tokens", "layout"]
    table = new_table(["devices"], columns[:-1])
    table.add_column("layout", overflow="fold")
    for point in curve.points:
        low_s, high_s = point.step_interval_s
        cells = [seconds_text(seconds) for seconds in (point.step_s, low_s, high_s)]
        cells += [
            f"{point.tokens_per_s:,.0f}",
            f"{point.efficiency:.0%}",
            three_figures(point.device_s_per_million_tokens),
        ]
        table.add_row(f"{point.devices}", *cells, point.layout.label())
    title = "Scaling, at this batch"
    if curve.knee is not None:
        title += f": up to {curve.knee} devices are used at least {KNEE:.0%} as well as at best"
    if (noise := curve.noise) is None:
        return titled(title, table)
    line = (
        f"a noise scale of {noise.noise_tokens:,.0f} tokens: of this batch's tokens {noise.batch_efficiency:.0%} are "
        f"learnt from; a sequence a replica on more than {noise.devices:,} devices is half noise or worse"
    )
    return titled(title, titled_below(table, line))


def titled_below(inner: "Table", line: str) -> "Table":
    """Something with a line under it."""
    from rich.table import Table

    grid = Table.grid()
    grid.add_row(inner)
    grid.add_row(line)
    return grid


def leads(ranked: Sequence[Prediction], place: int) -> bool:
    """Whether a layout is the first with an axis that divides models or sequences."""
    axes = ("pipeline", "context", "tensor", "expert")
    used = [axis for axis in axes if getattr(ranked[place].layout, axis) > 1]
    return any(all(getattr(before.layout, axis) == 1 for before in ranked[:place]) for axis in used)


def layout_cells(prediction: Prediction, *, own: bool) -> list[str]:
    """A row of the ranking; the job's own layout is marked."""
    layout, size = prediction.layout, gb(prediction.memory.total())
    where = layout.placement() + layout.manner() + (" <- this job" if own else "")
    zero = str(layout.zero) if layout.parameter_shards > 1 or layout.zero < 3 else "-"
    recompute = {"none": "-", 0: "-"}.get(layout.recompute, f"{layout.recompute}")
    first = " layers" if isinstance(layout.recompute, int) and layout.recompute else ""
    cells = [where, zero, str(layout.microbatch), recompute + first, str(layout.world_size)]
    if not prediction.step_s:
        return [*cells, "-", "-", "-", size]
    useful_share = prediction.step.useful / prediction.step_s
    step, tokens = seconds_text(prediction.step_s), three_figures(prediction.tokens_per_s)
    return [*cells, step, tokens, f"{useful_share:.1%}", size]


def rejections(rejected: Sequence[Rejected]) -> "Table | None":
    """What cannot run, why, and the nearest that can: for each number of ranks the split that misses least."""
    if not rejected:
        return None
    groups: dict[tuple[int, bool], list[Rejected]] = {}
    for one in rejected:
        groups.setdefault((one.layout.world_size, one.memory is None), []).append(one)
    table = new_table(["rejected", "why", "nearest that works"], [])
    for (ranks, _), members in list(groups.items())[:LISTED_REJECTIONS]:
        least = min(members, key=lambda r: r.memory.total() if r.memory is not None else 0.0)
        others = f" (and {len(members) - 1} more of {ranks} ranks)" if len(members) > 1 else ""
        table.add_row(least.layout.label() + others, least.reason, least.nearest or "none found")
    hidden = sum(len(members) for members in list(groups.values())[LISTED_REJECTIONS:])
    if hidden:
        table.add_row(f"... and {hidden} more", "see --json", "")
    return table


def notes(prediction: Prediction) -> "Table":
    """How far to trust the numbers, and what the largest words mean."""
    lines = list(prediction.notes)
    largest = max(prediction.step.rows(), key=lambda row: row[1])
    lines += [f"{name}: {MEANINGS[name]}" for name in dict.fromkeys(("useful", "inefficiency", largest[0]))]
    stages = [("Stages", blocks_held(prediction.pipeline))] if prediction.pipeline is not None else []
    table = labelled([*stages, *(("" if number else "Notes", line) for number, line in enumerate(lines))])
    table.style = "dim"
    return table


def new_table(words: Sequence[str], numbers: Sequence[str], *, wrap: bool = True) -> "Table":
    """A table without frames: columns of words to the left, of numbers to the right. wrap: whether words may wrap."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="underline")
    for word in words:
        table.add_column(word, overflow="fold", no_wrap=not wrap)
    for number in numbers:
        table.add_column(number, justify="right" if number else "left", no_wrap=True)
    return table


def bar(share: float) -> str:
    """A share as cells of a bar; a character that every terminal and log can show."""
    return "=" * round(share * BAR_CELLS)


def seconds_text(seconds: float) -> str:
    """Seconds with three figures; many of them as days."""
    if not seconds:
        return "unknown"
    if seconds >= LONG_S:
        return f"{three_figures(seconds / DAY_S)} days"
    if seconds >= 1:
        return f"{three_figures(seconds)} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def gb(size_bytes: float) -> str:
    """Bytes in GB, as datasheets count them; in MB below one."""
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"
