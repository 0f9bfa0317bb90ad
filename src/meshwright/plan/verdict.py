"""A plan's first sentence: whether one device is enough, and how it compares."""

from collections.abc import Sequence

import msgspec

from meshwright.plan.cost import three_figures
from meshwright.plan.fit import gb, host_refusal, reject_memory, with_layout
from meshwright.plan.frame import build_frame
from meshwright.plan.objective import Goal
from meshwright.plan.search import TIE
from meshwright.plan.smallest import least_layout, slim_layouts, smallest_cluster
from meshwright.plan.time import share_machine
from meshwright.record import Prediction
from meshwright.spec import Cluster, Job, Layout, count_parameters


def explain_verdict(
    job: Job, own: Prediction, one: Prediction | None, ranked: Sequence[Prediction], goal: Goal | None = None
) -> str:
    """Whether one device is enough, how it compares with the best layout and with the job's own; before that, what the
    goal comes to, where it is not the shortest step."""
    goal = goal or Goal()
    first = f"{explain_goal(job, ranked, goal)} " if ranked and goal.objective != "fastest" else ""
    return first + explain_need(job, own, one, ranked, goal)


def explain_goal(job: Job, ranked: Sequence[Prediction], goal: Goal) -> str:
    """The best layout for a goal that is not the shortest step."""
    best = ranked[0]
    if goal.objective in ("longest", "largest"):
        kept = {"offload": "none", **goal.fixed}
        if least_layout(job, job.cluster.devices, kept) is None:
            return f"{job.cluster.label()} hold this job only with a part of it offloaded, so it was not made larger."
    # Offloading, which is slow, is left out of these two.
    alone = "" if "offload" in goal.fixed or job.cluster.device.kind == "cpu" else " without offloading"
    if goal.objective == "longest":
        most = job.model.max_positions
        meant = ", as many as the model is meant for" if 0 < most < 2 * job.data.sequence else ""
        return (
            f"The longest sequence that {job.cluster.label()} hold{alone}: about {job.data.sequence:,} tokens{meant}."
        )
    if goal.objective == "largest":
        billions = count_parameters(job.model) / 1e9
        what = f"The largest model of this shape that {job.cluster.label()} hold{alone}"
        return f"{what}: {job.model.name}, {billions:.3g}B."
    if goal.objective == "cheapest":
        per_million = 1e6 * best.layout.world_size / best.tokens_per_s if best.tokens_per_s else 0.0
        return f"Cheapest: {in_words(best)}, {per_million:,.3g} device-seconds a million tokens."
    limit_s = goal.step_limit_s(job)
    if not best.step_s:
        return f"What makes {hours_text(goal.deadline_hours or 0.0)} is not known, because the device's peak is not."
    if limit_s is None or best.step_s > limit_s:
        return (
            f"No number of devices here makes {hours_text(goal.deadline_hours or 0.0)}. The fastest: {in_words(best)}."
        )
    hours = goal.deadline_hours * best.step_s / limit_s if goal.deadline_hours else 0.0
    ranks = best.layout.world_size
    are = "device is" if ranks == 1 else "devices are"
    low, middle, high = (three_figures(hours * times) for times in spread(best))
    return f"{ranks} {are} enough: {middle} hours of {goal.deadline_hours:g} (80% interval {low} to {high})."


def spread(prediction: Prediction) -> tuple[float, float, float]:
    """The step's interval, relative to what is expected: from, 1, to."""
    low_s, high_s = prediction.step_interval_s
    return low_s / prediction.step_s, 1.0, high_s / prediction.step_s


def hours_text(hours: float) -> str:
    """A number of hours in words."""
    return f"{hours:g} hour{'' if hours == 1 else 's'}"


def explain_need(job: Job, own: Prediction, one: Prediction | None, ranked: Sequence[Prediction], goal: Goal) -> str:
    """Whether one device is enough, and how it compares."""
    device = "process" if job.cluster.device.kind == "cpu" else "device"
    if not ranked:
        return nothing_searched_fits(job, own, goal)
    if one is None:
        # Of several, the first in rank; offloading is not what distributing is compared with.
        fewest = min(ranked, key=lambda p: (p.layout.offload != "none", p.layout.world_size))
        which = "the fastest found"
        if ranked[0].step_s > min(p.step_s for p in ranked):
            which = f"the simplest within {TIE:.0%} of the fastest found"
        best = f"also {which}" if fewest == ranked[0] else f"{which} is {in_words(ranked[0])}"
        offloading = fewest.layout.world_size == 1 or holds_offloaded(job, goal)
        why = " without offloading" if offloading else "" if goal.fixed else ": the model does not fit it"
        return f"One {device} is not enough{why}{with_fixed(goal)}. The fewest that work: {in_words(fewest)}; {best}."
    placed = share_machine(msgspec.structs.replace(job, layout=one.layout))
    recompute = "" if one.layout.recompute == "none" else f" with {one.layout.label()}"
    fits = f"it fits{recompute} ({gb(one.memory.total())} of {gb(placed.cluster.device.memory_bytes)} GB)"
    if not one.step_s:
        return f"One {device} is enough: {fits}. How fast is not known, because the device's peak is not."
    best = ranked[0]
    if best.layout.world_size > 1:
        gain, ranks = one.step_s / best.step_s, best.layout.world_size
        return (
            f"One {device} is enough: {fits}, {one.step_s:.3g} s a step. {ranks} are predicted {gain:.3g} times as "
            f"fast ({100 * gain / ranks:.0f}% of linear): {in_words(best)}."
        )
    return f"One {device} is enough: {fits}{compare_own(own, one, device)}."


def nothing_searched_fits(job: Job, own: Prediction, goal: Goal) -> str:
    """The verdict where no layout of the search fits: what would do. The job's own may fit, by what is left out."""
    needed, capacity = own.memory.total(), share_machine(job).cluster.device.memory_bytes
    if needed <= capacity and goal.fixed:
        # The job's own is another then.
        return f"Nothing fits on {job.cluster.label()}{with_fixed(goal)}: {slimmest(job, goal)}."
    if needed <= capacity:
        pace = f", {own.step_s:.3g} s a step" if own.step_s else ""
        fits = f"This job's layout fits ({gb(needed)} of {gb(capacity)} GB){pace}: {own.layout.label()}."
        return f"{fits} Nothing that was searched does on {job.cluster.label()}."
    name, size_bytes = max(own.memory.rows(), key=lambda row: row[1])
    largest = f"{name.replace('_', ' ')}, {gb(size_bytes)} GB in this job's layout"
    where = f"{job.cluster.label()}{with_fixed(goal)}"
    verdict = f"Nothing fits: no layout of {job.model.name} on {where}. The largest term is {largest}."
    if job.cluster.device.kind == "cpu":
        return verdict
    enough, offloaded = smallest_cluster(job, goal.fixed), None
    if "offload" not in goal.fixed:
        offloaded = smallest_cluster(job, {**goal.fixed, "offload": "parameters"})
    how = " without offloading" if offloaded else ""
    found = f"No cluster of such nodes would do{how}, as far as was looked"
    if enough:
        found = f"The smallest cluster that would do{how}: {placed_words(*enough)}"
    return f"{verdict} {found}{f'; with it, {placed_words(*offloaded)}' if offloaded else ''}."


def placed_words(cluster: Cluster, layout: Layout) -> str:
    """A cluster with the layout that fits it."""
    return f"{cluster.label()} ({layout.label()})"


def slimmest(job: Job, goal: Goal) -> str:
    """Why not even the layout that needs least, as is fixed, works on all devices."""
    least = next(slim_layouts(job, job.cluster.devices, goal.fixed), None)
    if least is None:
        return "none of them is legal"
    job = with_layout(job, least)
    refused = host_refusal(job, build_frame) or reject_memory(job, build_frame)
    return f"{least.label()} {refused.reason}"


def holds_offloaded(job: Job, goal: Goal) -> bool:
    """Whether one device holds the job with its parameters in the host's memory."""
    tried = "offload" not in goal.fixed and job.cluster.device.kind != "cpu"
    return tried and least_layout(job, 1, {**goal.fixed, "offload": "parameters"}) is not None


def with_fixed(goal: Goal) -> str:
    """What is fixed, in words."""
    return f" with {' and '.join(f'layout.{name}' for name in goal.fixed)} fixed" if goal.fixed else ""


def compare_own(own: Prediction, one: Prediction, device: str) -> str:
    """How the job's own layout compares with one device that nothing beats."""
    gain = own.step_s / one.step_s - 1
    if own.layout.world_size == 1:
        if gain >= TIE:
            return f", and is predicted {100 * gain:.0f}% faster as {one.layout.label()} than as this job has it"
        return ", and nothing found is faster" if device == "process" else ""
    why = ": they would share its cores" if device == "process" else ""
    if why and own.layout.microbatch != one.layout.microbatch:
        why += f", and microbatch {one.layout.microbatch} suits them better"
    if gain < TIE:
        return f", and this job's {own.layout.world_size} ranks are predicted no faster{why}"
    return (
        f", and is predicted {100 * gain:.0f}% faster than this job's {own.layout.world_size} ranks "
        f"({one.step_s:.3g} s a step against {own.step_s:.3g} s){why}"
    )


def in_words(prediction: Prediction) -> str:
    """A layout with its speed."""
    if not prediction.step_s:
        return prediction.layout.label()
    return f"{prediction.layout.label()} at {prediction.tokens_per_s:,.0f} tokens/s"
