"""What the differences between a layout and one process say: which are too large, where they begin, and why."""

import math
from collections.abc import Iterable

import msgspec

from meshwright.record.verification import Comparison, RankReport, Trial
from meshwright.spec import Layout, Split, split_of, split_table

# A tensor's difference counts against this share of the whole gradient where its own norm is smaller.
SMALLEST_SHARE = 1e-4
# A layout rounds once more where it sums over ranks.
ANGLE_SLACK = 2.0
# Losses and norms in a rounding precision: bf16 keeps 8 bits, and sums over many elements round less.
ROUNDED_BOUND = 2e-2
# What is left of a tensor after a constant factor, relative, up to which the factor is the explanation.
FACTOR_SPREAD = 1e-2


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
    outputs, gradients, weights = (merge(rank, trial.ranks) for rank in ("outputs", "gradients", "weights"))
    rounded = trial.angle is not None
    bound = ROUNDED_BOUND if rounded else trial.bound
    tensors = gradient_rows(gradients, trial)
    rows = [
        samples_row(trial.ranks),
        series_row("loss", [rank.losses for rank in trial.ranks], trial.reference.losses, bound),
        series_row("gradient norm", [rank.norms for rank in trial.ranks], trial.reference.norms, bound),
        worst("gradients of step 1", tensors),
    ]
    if not rounded:
        # In a rounding precision what modules give and what training makes of it differ by more than any fault shows.
        rows[1:1] = [worst("outputs of step 1", tensor_rows(outputs, trial.bound))]
        rows.append(worst(f"weights after step {len(trial.reference.losses)}", tensor_rows(weights, trial.bound)))
    verdict = Verdict(rows=tuple(rows), tensors=tuple(tensors), cause=None)
    if verdict.agrees:
        return verdict
    return msgspec.structs.replace(verdict, cause=find_cause(trial, verdict, outputs, gradients))


def merge(field: str, ranks: Iterable[RankReport]) -> dict[str, Comparison]:
    """Sums over ranks, in the order in which the first rank saw them."""
    merged: dict[str, Comparison] = {}
    for rank in ranks:
        comparisons: dict[str, Comparison] = getattr(rank, field)
        for name, part in comparisons.items():
            merged[name] = merged.get(name, Comparison()) + part
    return merged


def tensor_rows(tensors: dict[str, Comparison], bound: float) -> list[Row]:
    """The relative difference of each."""
    floor = SMALLEST_SHARE * math.sqrt(sum(part.reference for part in tensors.values()))
    return [Row(what=name, difference=part.relative(floor), bound=bound) for name, part in tensors.items()]


def gradient_rows(gradients: dict[str, Comparison], trial: Trial) -> list[Row]:
    """The relative difference of each gradient; in a rounding precision, the angle it is off by."""
    if trial.angle is None:
        return tensor_rows(gradients, trial.bound)
    floor = SMALLEST_SHARE**2 * sum(part.reference for part in gradients.values())
    return [
        # A gradient that is truly zero has no direction.
        Row(what=name, difference=1 - part.cosine if part.reference > floor else 0.0, bound=ANGLE_SLACK * trial.angle)
        for name, part in gradients.items()
    ]


def worst(what: str, rows: list[Row]) -> Row:
    """The row with the largest difference, one that is not a number above all."""
    row = max(rows, key=lambda row: math.inf if math.isnan(row.difference) else row.difference)
    return Row(what=what, difference=row.difference, bound=row.bound, where=row.what)


def samples_row(ranks: list[RankReport]) -> Row:
    """Ranks that trained on samples that were not theirs."""
    wrong = [rank for rank in ranks if rank.foreign >= 0]
    where = f"rank {wrong[0].rank}, sample {wrong[0].foreign}" if wrong else ""
    return Row(what="samples", difference=float(len(wrong)), bound=0.0, where=where)


def series_row(what: str, ours: list[list[float]], theirs: list[float], bound: float) -> Row:
    """The largest relative difference over steps and ranks."""
    found = [
        (abs(value - wanted) / abs(wanted) if math.isfinite(value) else math.inf, step)
        for series in ours
        for step, (value, wanted) in enumerate(zip(series, theirs, strict=True), start=1)
    ]
    difference, step = max(found)
    return Row(what=what, difference=difference, bound=bound, where=f"step {step}")


def find_cause(
    trial: Trial, verdict: Verdict, outputs: dict[str, Comparison], gradients: dict[str, Comparison]
) -> Cause:
    """The first difference in the order in which a step computes: samples, outputs, loss, gradients, norm, weights."""
    rows = {row.what.partition(" of ")[0]: row for row in verdict.rows}
    layout = trial.job.layout
    if not rows["samples"].agrees:
        return Cause(
            module=rows["samples"].where,
            factor=None,
            likely="ranks along replica and shard do not take different parts of the global batch",
        )
    wrong = [row.what for row in tensor_rows(outputs, trial.bound) if not row.agrees]
    if wrong and not ("outputs" in rows and rows["outputs"].agrees) and trial.angle is None:
        return output_cause(trial, wrong[0], outputs[wrong[0]])
    loss = trial.ranks[0].losses[0] / trial.reference.losses[0]
    if abs(loss - 1) > rows["loss"].bound:
        return Cause(module="loss", factor=loss, likely=likely_factor(loss, layout, trial))
    wrong = [row.what for row in verdict.tensors if not row.agrees]
    if wrong:
        return gradient_cause(trial, wrong, gradients)
    norm = trial.ranks[0].norms[0] / trial.reference.norms[0]
    if abs(norm - 1) > rows["gradient norm"].bound:
        return Cause(
            module="gradient norm",
            factor=norm,
            likely="every gradient agrees and their norm does not: parts on other ranks are left out or counted twice",
        )
    return Cause(
        module="update",
        factor=None,
        likely="loss, gradients and norm of step 1 agree: clipping, the learning rate or the optimizer's step differ",
    )


def output_cause(trial: Trial, module: str, part: Comparison) -> Cause:
    """A module whose inputs agree and whose output does not."""
    likely: dict[Split | None, str] = {
        "row": "its matrix is split by rows: the ranks' partial results must be summed along tensor",
        "vocabulary": "each rank looks up its own tokens: the ranks' results must be summed along tensor",
        "positions": "each rank must look up the positions of its own part of the sequence",
        "logits": "its input must be gathered along the sequence, and each rank gives its own tokens' logits",
        "column": "its input must be gathered along the sequence, and each rank has its own outputs",
        "experts": "each token must come to all of its experts and back to its own place: one is dropped or misplaced",
        "kv_heads": "each rank must have the key and value heads that its query heads look at",
    }
    word = split_of(split_table(trial.job.model), module)
    return Cause(
        module=module, factor=constant_factor(part), likely=likely.get(word, "its parts are put together wrong")
    )


def gradient_cause(trial: Trial, wrong: list[str], gradients: dict[str, Comparison]) -> Cause:
    """Outputs and loss agree, gradients do not. Gradients come from the loss backwards, so the last of the wrong ones
    in the model's order was the first to go wrong."""
    module = wrong[-1].rpartition(".")[0]
    factors = [constant_factor(gradients[name]) for name in wrong]
    first = factors[-1]
    same = first is not None and all(f is not None and math.isclose(f, first, rel_tol=FACTOR_SPREAD) for f in factors)
    if same and first is not None:
        return Cause(module=module, factor=first, likely=likely_factor(first, trial.job.layout, trial))
    words = "its gradient's parts on the ranks are not summed, or summed along a wrong axis"
    if module.endswith(".router"):
        words += "; or the weights that it gives each expert are not differentiated"
    return Cause(module=module, factor=None, likely=words)


def constant_factor(part: Comparison) -> float | None:
    """The factor between ours and the reference, if it is the same for all elements."""
    if not part.ours or not part.reference:
        return None
    left = max(0.0, part.ours - part.product**2 / part.reference)
    return part.ratio if math.sqrt(left / part.ours) < FACTOR_SPREAD else None


def likely_factor(factor: float, layout: Layout, trial: Trial) -> str:
    """What usually makes a loss or all gradients wrong by a constant factor; all of it where sizes are the same."""
    accumulation = layout.accumulation(trial.job.data.global_batch)
    data, tensor, world = layout.data_size, layout.tensor, layout.world_size
    known = [
        (
            accumulation,
            (
                f"the {accumulation} microbatches of a step: each one's loss must be divided by what counts "
                "in the whole global batch, not in itself"
            ),
        ),
        (
            1 / data,
            (
                f"the {data} ranks of replica x shard: gradients are averaged over them, "
                "though the loss is divided by the global batch already"
            ),
        ),
        (
            data,
            (
                f"the {data} ranks of replica x shard: gradients are summed over them once "
                "too often, or the loss is divided by one rank's share"
            ),
        ),
        (tensor, f"the {tensor} ranks of tensor: what they all have is summed over them"),
        (1 / tensor, f"the {tensor} ranks of tensor: what each has a part of is averaged over them"),
    ]
    if world not in (data, tensor):
        known += [
            (world, f"the {world} ranks: what they all have is summed over them"),
            (1 / world, f"the {world} ranks: what each has a part of is averaged over them"),
        ]
    words = [words for size, words in known if size != 1 and math.isclose(factor, size, rel_tol=0.05)]
    return (
        "; or ".join(words) or "a constant factor that is none of the layout's sizes: look at how the loss is divided"
    )
