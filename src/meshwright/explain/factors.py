"""What a constant factor between a layout and one process says: over which ranks something is summed or averaged."""

import math

from meshwright.record.verification import Trial
from meshwright.spec import Layout

# A size, and what is wrong where things are off by it.
Factors = list[tuple[float, str]]


def likely_factor(factor: float, trial: Trial, *, routed: bool = False) -> str:
    """What usually makes a loss or gradients wrong by a constant factor; all of it where sizes are the same.

    routed: of a mixture's experts, which lie on the ranks in their own way.
    """
    layout, counted = trial.job.layout, trial.reference.counted
    accumulation = layout.accumulation(trial.job.data.global_batch)
    ranks = expert_factors(layout) if routed else rank_factors(layout)
    known = [
        (
            1 / accumulation,
            (
                f"the {accumulation} microbatches of a step: gradients are averaged over them, "
                "though each one's loss is divided by the global batch already"
            ),
        ),
        (counted, f"the {counted} tokens that count in a step: what is summed over them is not divided by them"),
        (1 / counted, f"the {counted} tokens that count in a step: what is divided by them is divided once more"),
        (
            accumulation,
            (
                f"the {accumulation} microbatches of a step: each one's loss must be divided by what counts "
                "in the whole global batch, not in itself"
            ),
        ),
        *ranks,
    ]
    words = [words for size, words in known if size != 1 and math.isclose(factor, size, rel_tol=0.05)]
    return (
        "; or ".join(words) or "a constant factor that is none of the layout's sizes: look at how the loss is divided"
    )


def rank_factors(layout: Layout) -> Factors:
    """Factors that come of summing over the wrong ranks, or of a mean in place of a sum."""
    data, tensor, world = layout.replica * layout.parameter_shards, layout.tensor, layout.world_size
    found = [
        *data_factors(data, "of replica x shard x context" if layout.context > 1 else "of replica x shard"),
        (tensor, f"the {tensor} ranks of tensor: what they all have is summed over them"),
        (1 / tensor, f"the {tensor} ranks of tensor: what each has a part of is averaged over them"),
    ]
    if world not in (data, tensor):
        found += [
            (world, f"the {world} ranks: what they all have is summed over them"),
            (1 / world, f"the {world} ranks: what each has a part of is averaged over them"),
        ]
    return found


def expert_factors(layout: Layout) -> Factors:
    """The same of a mixture's experts: their gradients are summed over the ranks that share the same ones, and all that
    other ranks' tokens have to say of them comes with the tokens."""
    holders, expert = layout.replica * layout.expert_shard, layout.expert
    axes = "that hold parts or copies of the same experts"
    return [
        *data_factors(holders, axes),
        (expert, f"the {expert} ranks of expert: gradients of different experts are summed over them"),
        (1 / expert, f"the {expert} ranks of expert: their tokens' gradients are averaged over them"),
    ]


def data_factors(ranks: int, which: str) -> Factors:
    """Of ranks that each have tokens of their own."""
    ranks_of = f"the {ranks} ranks {which}"
    return [
        (
            1 / ranks,
            f"{ranks_of}: gradients are averaged over them, though the loss is divided by the global batch already",
        ),
        (
            ranks,
            f"{ranks_of}: gradients are summed over them once too often, or the loss is divided by one rank's share",
        ),
    ]
