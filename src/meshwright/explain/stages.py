"""What verify says of faults that a pipeline's stages tell apart."""

import math
from collections.abc import Collection, Mapping

from meshwright.record.verification import SMALLEST_SHARE, Comparison, Trial
from meshwright.spec import Job, end_shapes, stage_blocks

# Of a stage's part in the squared norm: the least that stands out from rounding, and how near to it, relative, what the
# norm lacks must be.
LEAST_SHARE = 1e-2
NEAR = 0.05
# Fewer microbatches than this, and a lost one looks like a mean in place of a sum.
FEWEST_MICROBATCHES = 3

Gradients = Mapping[str, Comparison]


def stages_of(job: Job, names: Collection[str]) -> dict[str, int]:
    """The stage of each parameter. Before the blocks stands the first one's, after them the last's."""
    stages = stage_blocks(job.model, job.layout, job.data.sequence)
    _, after = end_shapes(job.model)
    layers = {n: int(n.split(".")[1]) if n.startswith("blocks.") else stages[-1][-1] * (n in after) for n in names}
    return {n: next(stage for stage, blocks in enumerate(stages) if layers[n] in blocks) for n in names}


def stage_left_out(trial: Trial, gradients: Gradients, factor: float) -> int | None:
    """The stage without whose gradients the norm would be off by `factor`; None where there is none."""
    if trial.job.layout.pipeline == 1 or not math.isfinite(factor):
        return None
    squares: dict[int, float] = {}
    for name, stage in stages_of(trial.job, gradients).items():
        # Copies on several ranks are compared on each, and count once.
        part = gradients[name]
        once = part.reference * trial.reference.gradients[name] / part.elements
        squares[stage] = squares.get(stage, 0.0) + once
    shares = {stage: square / sum(squares.values()) for stage, square in squares.items()}
    lacking = 1 - factor * factor
    nearest = min(shares, key=lambda stage: abs(shares[stage] - lacking))
    found = shares[nearest] > LEAST_SHARE and math.isclose(shares[nearest], lacking, rel_tol=NEAR)
    return nearest if found else None


def stage_fault(trial: Trial, gradients: Gradients, wrong: Collection[str]) -> str | None:
    """Why these gradients are wrong, if what stages tell each other is; None where something else must be.

    Gradients come from the last stage backwards, so what a stage is told wrongly makes all before it wrong, and nothing
    after it.
    """
    job = trial.job
    if job.layout.pipeline == 1:
        return None
    if job.model.tied_embeddings and set(wrong) == {"embedding.weight"}:
        return (
            "it is tied to the output layer, in another stage of the pipeline: the two copies are not both given the "
            "sum of their gradients"
        )
    stages = stages_of(job, gradients)
    told = max(stages[name] for name in wrong)
    if told == max(stages.values()):
        return None
    smallest = SMALLEST_SHARE**2 * sum(part.reference for part in gradients.values())
    before = [name for name in gradients if stages[name] <= told and gradients[name].reference > smallest]
    if not set(before) <= set(wrong):
        return None
    return (
        f"every gradient of the pipeline's stages up to {told} is wrong and none behind: what stage {told + 1} passes "
        f"back to stage {told} is dropped, counted twice or another microbatch's"
    )


def microbatch_fault(trial: Trial, gradients: Gradients, wrong: Collection[str]) -> str | None:
    """Whether these gradients lack about as much as one microbatch adds, or have it twice; None where neither.

    Microbatches differ, so that it is no constant factor.
    """
    layout = trial.job.layout
    microbatches = layout.accumulation(trial.job.data.global_batch)
    reference = sum(gradients[name].reference for name in wrong)
    if layout.pipeline == 1 or microbatches < FEWEST_MICROBATCHES or not reference:
        return None
    more = microbatches * (sum(gradients[name].product for name in wrong) / reference - 1)
    if not 0.5 < abs(more) < 1.5:
        return None
    what = "has about one too many" if more > 0 else "lacks about one"
    how = "run twice" if more > 0 else "left out"
    return f"it {what} of the {microbatches} microbatches of a step: a backward pass, or a half of one, is {how}"
