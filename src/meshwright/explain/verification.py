"""What the differences between a layout and one process say: which are too large, where they begin, and why."""

import math
from collections.abc import Iterable

import msgspec

from meshwright.explain.factors import likely_factor
from meshwright.explain.stages import microbatch_fault, stage_fault, stage_left_out
from meshwright.record.verification import ATTEND, Comparison, RankReport, Trial, relative_differences
from meshwright.spec import Layout, Split, split_of, split_table

# In a rounding precision: what differs by less is not worth a word, though one process is more exact.
ROUNDED_BOUND = 2e-2
# A layout rounds in other places than one process, and once more where it sums over ranks.
ROUNDING_SLACK = 2.0
# What is left of a tensor after a constant factor, relative, up to which the factor is the explanation.
FACTOR_SPREAD = 1e-2
NOT_COMPARED = "not compared"
NOT_FINITE = "is nan or inf, and nothing that was compared before it is"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One thing compared: what, the largest difference and where it is, and the bound it is held to."""

    what: str
    difference: float
    bound: float
    where: str = ""

    @property
    def agrees(self) -> bool:
        """Whether the difference is within the bound; nan is not."""
        return self.difference <= self.bound


class Cause(msgspec.Struct, frozen=True, kw_only=True):
    """Where the difference begins, a constant factor between the two where there is one, and what usually does it."""

    module: str
    factor: float | None
    likely: str


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """rows: the largest differences by kind. tensors: each gradient's. cause: None where all agree."""

    rows: tuple[Row, ...]
    tensors: tuple[Row, ...]
    cause: Cause | None

    @property
    def agrees(self) -> bool:
        """Whether the layout equals one process."""
        return all(row.agrees for row in self.rows)


def explain_trial(trial: Trial) -> Verdict:
    """Judge a trial and name the first thing that differs."""
    rounding = trial.reference.rounding
    exact = rounding is None
    # In a rounding precision what modules give and what training makes of it differ by more than any fault shows.
    outputs = tensor_rows("outputs", trial) if exact else []
    weights = tensor_rows("weights", trial) if exact else []
    gradients = tensor_rows("gradients", trial)
    loss_bound = trial.bound if rounding is None else rounded_bound(rounding.loss)
    norm_bound = trial.bound if rounding is None else rounded_bound(rounding.norm)
    rows = [
        samples_row(trial.ranks),
        *([places_row(trial.ranks)] if trial.job.layout.context > 1 else []),
        *([worst("outputs of step 1", outputs)] if exact else []),
        series_row("loss", [rank.losses for rank in trial.ranks], trial.reference.losses, loss_bound),
        series_row("gradient norm", [rank.norms for rank in trial.ranks], trial.reference.norms, norm_bound),
        worst("gradients of step 1", gradients),
        *([worst(f"weights after step {len(trial.reference.losses)}", weights)] if exact else []),
    ]
    agrees = all(row.agrees for row in rows)
    cause = None if agrees else find_cause(trial, rows, wrong_of(outputs), wrong_of(gradients), wrong_of(weights))
    return Verdict(rows=tuple(rows), tensors=tuple(gradients), cause=cause)


def merge(field: str, ranks: Iterable[RankReport]) -> dict[str, Comparison]:
    """Sums over ranks."""
    merged: dict[str, Comparison] = {}
    for rank in ranks:
        comparisons: dict[str, Comparison] = getattr(rank, field)
        for name, part in comparisons.items():
            merged[name] = merged.get(name, Comparison()) + part
    return merged


def tensor_rows(field: str, trial: Trial) -> list[Row]:
    """The relative difference of each tensor of one kind, in the reference's order; one that a rank has nothing of, or
    that all have not the whole of, is as far off as can be."""
    rounding = trial.reference.rounding
    merged = merge(field, trial.ranks)
    differences = relative_differences(merged)
    elements: dict[str, int] = getattr(trial.reference, field)
    # Each stage of a pipeline has its own tensors, on as many ranks as any other.
    holders = len(trial.ranks) // trial.job.layout.pipeline
    rows: list[Row] = []
    for name, whole in elements.items():
        bound = trial.bound if rounding is None else rounded_bound(rounding.gradients[name])
        held = sum(name in getattr(rank, field) for rank in trial.ranks)
        if held >= holders and merged[name].elements >= whole:
            rows.append(Row(what=name, difference=differences[name], bound=bound))
        else:
            rows.append(Row(what=name, difference=math.inf, bound=bound, where=NOT_COMPARED))
    return rows


def rounded_bound(alone: float) -> float:
    """What a layout may differ from fp32 by, where one process in its precision differs by `alone`."""
    return max(ROUNDED_BOUND, ROUNDING_SLACK * alone)


def wrong_of(rows: Iterable[Row]) -> list[Row]:
    """Those beyond their bounds."""
    return [row for row in rows if not row.agrees]


def worst(what: str, rows: list[Row]) -> Row:
    """The row that is farthest beyond its own bound, or nearest to it."""
    row = max(rows, key=lambda row: row.difference / row.bound)
    return Row(what=what, difference=row.difference, bound=row.bound, where=f"{row.what} {row.where}".strip())


def samples_row(ranks: list[RankReport]) -> Row:
    """Ranks that trained on samples that were not theirs."""
    wrong = [rank for rank in ranks if rank.foreign >= 0]
    where = f"rank {wrong[0].rank}, sample {wrong[0].foreign}" if wrong else ""
    return Row(what="samples", difference=float(len(wrong)), bound=0.0, where=where)


def places_row(ranks: list[RankReport]) -> Row:
    """Ranks whose tokens stand elsewhere in the sequence than their model is told."""
    wrong = [rank for rank in ranks if rank.misplaced >= 0]
    where = f"rank {wrong[0].rank}, token {wrong[0].misplaced}" if wrong else ""
    return Row(what="places of tokens", difference=float(len(wrong)), bound=0.0, where=where)


def series_row(what: str, ours: list[list[float]], theirs: list[float], bound: float) -> Row:
    """The largest relative difference over steps and ranks."""
    found = [
        (abs(off_by(value, wanted) - 1), -step)
        for series in ours
        for step, (value, wanted) in enumerate(zip(series, theirs, strict=True), start=1)
    ]
    difference, step = max(found)
    return Row(what=what, difference=difference, bound=bound, where=f"step {-step}")


def off_by(value: float, wanted: float) -> float:
    """The factor between the two; inf where one is nan or inf."""
    if not (math.isfinite(value) and math.isfinite(wanted)):
        return math.inf
    return value / wanted if wanted else 1.0 if value == 0 else math.inf


def find_cause(trial: Trial, rows: list[Row], outputs: list[Row], gradients: list[Row], weights: list[Row]) -> Cause:
    """The first difference in the order in which a step computes: samples, places, outputs, loss, gradients, norm,
    weights.

    outputs, gradients, weights: those that differ.
    """
    by_kind = {row.what.partition(" of ")[0]: row for row in rows}
    if not all(map(math.isfinite, (*trial.reference.losses, *trial.reference.norms))):
        words = "its own loss or gradient norm is nan or inf: there is nothing to hold the layout to"
        return Cause(module="one process", factor=None, likely=words)
    if not by_kind["samples"].agrees:
        words = "ranks along replica and shard do not take different parts of the global batch"
        return Cause(module=by_kind["samples"].where, factor=None, likely=words)
    places = by_kind.get("places")
    if places is not None and not places.agrees:
        words = "a rank along context must give its tokens the places of the two chunks that it holds, counted in the"
        return Cause(module=places.where, factor=None, likely=f"{words} whole sequence or document")
    if outputs:
        return output_cause(trial, outputs[0])
    loss = off_by(trial.ranks[0].losses[0], trial.reference.losses[0])
    if abs(loss - 1) > by_kind["loss"].bound:
        return series_cause("loss", loss, likely_factor(loss, trial))
    if gradients:
        return gradient_cause(trial, gradients)
    norm = off_by(trial.ranks[0].norms[0], trial.reference.norms[0])
    if abs(norm - 1) > by_kind["gradient norm"].bound:
        words = "every gradient agrees and their norm does not: parts on other ranks are left out or counted twice"
        stage = stage_left_out(trial, merge("gradients", trial.ranks), norm)
        if stage is not None:
            words = f"every gradient agrees and their norm leaves out stage {stage} of the pipeline"
        return series_cause("gradient norm", norm, words)
    return update_cause([row.what for row in weights])


def update_cause(wrong: list[str]) -> Cause:
    """All of step 1 agrees up to its update, and some weights do not after the last step."""
    words = "clipping, the learning rate or the optimizer's step differ"
    biases = [name for name in wrong if name.endswith(".router.bias")]
    if not biases:
        return Cause(module="update", factor=None, likely=f"loss, gradients and norm of step 1 agree: {words}")
    # Moved wrongly, they soon have other experts chosen, and then all weights differ.
    moved = "the bias that experts are chosen by is moved by other counts than the whole global batch's"
    likely = moved if len(biases) == len(wrong) else f"{moved}; or {words}"
    return Cause(module=biases[0].rpartition(".")[0], factor=None, likely=likely)


def series_cause(what: str, factor: float, likely: str) -> Cause:
    """Of a number a step, off by a factor."""
    if not math.isfinite(factor):
        return Cause(module=what, factor=None, likely=f"it {NOT_FINITE}")
    return Cause(module=what, factor=factor, likely=likely)


def output_cause(trial: Trial, row: Row) -> Cause:
    """A module whose inputs agree and whose output does not."""
    if row.where == NOT_COMPARED:
        words = "a rank does not run it, or the ranks' parts are not the whole of its output"
        return Cause(module=row.what, factor=None, likely=words)
    part = merge("outputs", trial.ranks)[row.what]
    if not part.finite:
        return Cause(module=row.what, factor=None, likely=f"its output {NOT_FINITE}")
    likely: dict[Split | None, str] = {
        "row": "its matrix is split by rows: the ranks' partial results must be summed along tensor",
        "vocabulary": "each rank looks up its own tokens: the ranks' results must be summed along tensor",
        "positions": "each rank must look up the positions of its own part of the sequence",
        "logits": "its input must be gathered along the sequence, and each rank gives its own tokens' logits",
        "column": "its input must be gathered along the sequence, and each rank has its own outputs",
        "experts": "each token must come to all of its experts and back to its own place: one is dropped or misplaced",
        "kv_heads": "each rank must have the key and value heads that its query heads look at",
    }
    words = likely.get(split_of(split_table(trial.job.model), row.what), "its parts are put together wrong")
    if row.what.endswith(f".{ATTEND}"):
        words = of_attention(trial.job.layout)
    return Cause(module=row.what, factor=part.factor(FACTOR_SPREAD), likely=words)


def of_attention(layout: Layout) -> str:
    """What is wrong with what attention mixes: queries, keys and values agree, so these are not the right ones."""
    if layout.context == 1:
        return "its queries do not see the keys that the mask says, or look at other ranks' key heads"
    if layout.context_form == "all-to-all":
        return (
            "heads and tokens are exchanged wrongly along context: each rank must get all tokens of its heads in "
            "the order of the whole sequence, with the key heads they look at, and of all heads its two chunks back"
        )
    return (
        "its queries see keys that they should not, or miss some: for each two chunks along context, all of the "
        "earlier one is seen by the later one, each one's own past by itself, and as much of it as the mask says"
    )


def gradient_cause(trial: Trial, wrong: list[Row]) -> Cause:
    """Outputs and loss agree, gradients do not. Gradients come from the loss backwards, so the last of the wrong ones
    in the model's order was the first to go wrong."""
    missing = [row.what for row in wrong if row.where == NOT_COMPARED]
    if missing:
        words = "a rank has no gradient of it, or the ranks' parts are not the whole of it"
        return Cause(module=missing[-1], factor=None, likely=words + of_router(missing[-1].rpartition(".")[0]))
    merged = merge("gradients", trial.ranks)
    module, parts = wrong[-1].what.rpartition(".")[0], [merged[row.what] for row in wrong]
    if not parts[-1].finite:
        return Cause(module=module, factor=None, likely=f"its gradient {NOT_FINITE}")
    spreads = [max(FACTOR_SPREAD, row.bound) for row in wrong]
    factors = [part.factor(spread) for part, spread in zip(parts, spreads, strict=True)]
    # The largest's is least rounded.
    first, _ = max(zip(factors, parts, strict=True), key=lambda pair: pair[1].reference)
    same = all(
        factor is not None and first is not None and math.isclose(factor, first, rel_tol=spread)
        for factor, spread in zip(factors, spreads, strict=True)
    )
    names = [row.what for row in wrong]
    if words := stage_fault(trial, merged, names):
        return Cause(module=module, factor=first if same else None, likely=words)
    if same and first is not None:
        routed = all(is_routed(trial, row.what.rpartition(".")[0]) for row in wrong)
        return Cause(module=module, factor=first, likely=likely_factor(first, trial, routed=routed))
    if words := microbatch_fault(trial, merged, names):
        return Cause(module=module, factor=None, likely=words)
    words = "its gradient's parts on the ranks are not summed, or summed along a wrong axis"
    return Cause(module=module, factor=None, likely=words + of_router(module))


def is_routed(trial: Trial, module: str) -> bool:
    """Whether a module is a mixture's experts."""
    return split_of(split_table(trial.job.model), module) == "experts"


def of_router(module: str) -> str:
    """What else is wrong with gradients, if they are a router's."""
    return "; or the weights that it gives each expert are not differentiated" if module.endswith(".router") else ""
