"""A plan's first sentence: whether one device is enough, and how it compares."""

from collections.abc import Sequence

import msgspec

from meshwright.plan.fit import gb
from meshwright.plan.search import TIE
from meshwright.plan.time import share_machine
from meshwright.record import Prediction
from meshwright.spec import Job


def explain_verdict(job: Job, own: Prediction, one: Prediction | None, ranked: Sequence[Prediction]) -> str:
    """Whether one device is enough, how it compares with the best layout and with the job's own."""
    device = "process" if job.cluster.device.kind == "cpu" else "device"
    if not ranked:
        return nothing_searched_fits(job, own)
    if one is None:
        fewest = min(ranked, key=lambda p: p.layout.world_size)  # of several, the first in rank
        which = "the fastest found"
        if ranked[0].step_s > min(p.step_s for p in ranked):
            which = f"the simplest within {TIE:.0%} of the fastest found"
        best = f"also {which}" if fewest == ranked[0] else f"{which} is {in_words(ranked[0])}"
        return (
            f"One {device} is not enough: the model does not fit it. The fewest that work: {in_words(fewest)}; {best}."
        )
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


def nothing_searched_fits(job: Job, own: Prediction) -> str:
    """The verdict where no layout of the search fits; the job's own may, by what the search leaves out."""
    needed, capacity = own.memory.total(), share_machine(job).cluster.device.memory_bytes
    if needed <= capacity:
        pace = f", {own.step_s:.3g} s a step" if own.step_s else ""
        fits = f"This job's layout fits ({gb(needed)} of {gb(capacity)} GB){pace}: {own.layout.label()}."
        return f"{fits} Nothing else does on {job.cluster.label()}; offloading is not searched."
    name, size_bytes = max(own.memory.rows(), key=lambda row: row[1])
    largest = f"{name.replace('_', ' ')}, {gb(size_bytes)} GB in this job's layout"
    verdict = f"Nothing fits: no layout of {job.model.name} on {job.cluster.label()}. The largest term is {largest}."
    if job.cluster.device.kind == "cpu" or job.layout.offload != "none":
        return verdict
    return f'{verdict} layout.offload = "parameters" was not searched: it keeps states in the host\'s memory.'


def compare_own(own: Prediction, one: Prediction, device: str) -> str:
    """How the job's own layout compares with one device that nothing beats."""
    if own.layout.world_size == 1:
        return ", and nothing found is faster" if device == "process" else ""
    gain = own.step_s / one.step_s - 1
    why = ": they would share its cores" if device == "process" else ""
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
