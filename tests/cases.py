"""Cases for the tests that hold layouts equal to one process: made from the axes and the settings, not typed.

All of them are too many. `fast_cases` are few that hold every two choices together once; `slow_cases` are every layout,
with each choice in turns.
"""

from collections.abc import Container, Iterable
from dataclasses import dataclass, fields, replace
from itertools import combinations, cycle, islice, product
from math import prod
from pathlib import Path
from random import Random
from typing import Any, get_args

from jobs import tiny_job
from mixtures import MIXTURES, mixture_job

from meshwright.spec import AXES, BUILT_FAMILIES, FAMILIES, ContextForm, Job, Layout, Schedule, stage_count
from meshwright.spec.schedule import SPLIT_BACKWARD

DENSE_FAMILIES = tuple(family for family in BUILT_FAMILIES if not FAMILIES[family].mixture)
RECOMPUTE = ("none", "selective", "full", 1)
# Values that need no name before them.
CHOSEN = {*RECOMPUTE[:3], *get_args(Schedule), *get_args(ContextForm)}
# Ranks that no power of two counts have one layout an axis or two, which leave unequal parts.
MOST_RANKS = 8
# Cases of a layout to choose a fast one from.
DRAWS = 10
# A mixture's routers must not be in doubt (tests/mixtures.py), which is known of this batch and these models.
MIXTURE_BATCH, MIXTURE_SEQUENCE, MIXTURE_HEADS, MIXTURE_EXPERTS, MIXTURE_LAYERS = 8, 16, 4, 8, 4


@dataclass(frozen=True)
class Case:
    """A layout, and the model and batch that it is tried with.

    family: a dense one, or the name of a mixture.
    accumulation: microbatches of a step, in units of the fewest that the schedule takes.
    """

    family: str = "llama"
    pipeline: int = 1
    replica: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1
    schedule: Schedule = "1f1b"
    context_form: ContextForm = "ring"
    zero: int = 3
    recompute: str | int = "none"
    accumulation: int = 1
    tied: bool = False
    documents: bool = False

    @property
    def ranks(self) -> int:
        return prod(getattr(self, axis) for axis in AXES)

    @property
    def data_size(self) -> int:
        return self.replica * self.shard

    @property
    def stages(self) -> int:
        return stage_count(Layout(pipeline=self.pipeline, schedule=self.schedule))

    @property
    def microbatches(self) -> int:
        """That a rank runs in a step."""
        return self.accumulation * (self.stages if self.schedule == "dualpipev" else self.pipeline)

    def __str__(self) -> str:
        words = [self.family]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default:
                words.append(
                    field.name if value is True else value if isinstance(value, str) else f"{field.name}{value}"
                )
        return "-".join(words)

    def layout(self) -> dict[str, Any]:
        """The job's layout, but for the microbatch."""
        names = (*AXES, "expert", "zero", "recompute", "schedule", "context_form")
        return {name: getattr(self, name) for name in names}


# --- The job of a case ----------------------------------------------------------------------------------------------


def build_job(folder: Path, case: Case, **sections: dict[str, Any]) -> Job:
    """A job of the case's layout on the smallest model and batch that it divides."""
    layers = max(2, case.stages + 1)
    if case.family in MIXTURES:
        layers = 2 if case.stages <= 2 else MIXTURE_LAYERS
        sections["model"] = {"layers": layers} | sections.get("model", {})
        sections["layout"] = case.layout() | sections.get("layout", {})
        return mixture_job(folder, case.family, accumulation=case.microbatches, **sections)
    heads = 8 // (case.context * case.tensor) * case.context * case.tensor
    learned = case.family == "gpt2"
    part = 2 * case.context * case.tensor if case.context > 1 else case.tensor
    sequence = -(-32 // part) * part
    least = case.data_size * case.microbatches
    batch = -(-32 // least) * least
    table: dict[str, dict[str, Any]] = {
        "model": {
            "family": case.family,
            "layers": layers,
            # No multiple of the sizes of shard: ranks hold unequal parts.
            "d_model": 36,
            "heads": heads,
            "kv_heads": heads if learned else key_heads(heads, case.tensor),
            "head_dim": 8,
            "feed_forward": 45 * heads,
            # Prime: uneven along tensor and shard. More than the 257 byte tokens.
            "vocabulary": 263,
            "max_positions": sequence if learned else 0,
            "attention_window": 17 if case.family == "mistral" else 0,
            "tied_embeddings": case.tied,
        },
        "data": {
            "sequence": sequence,
            "global_batch": batch,
            "attention": "document" if case.documents else "sample",
        },
        "layout": case.layout() | {"microbatch": batch // least},
    }
    for name, section in sections.items():
        table[name] = table.get(name, {}) | section
    return tiny_job(folder, processes=case.ranks, **table)


def key_heads(heads: int, tensor: int) -> int:
    """Few, so that ranks share them where they can."""
    return next(few for few in (2, 3, 1) if heads % few == 0 and (few % tensor == 0 or tensor % few == 0))


# --- What there is to choose ----------------------------------------------------------------------------------------

# Values by the setting's name.
Choices = dict[str, tuple[Any, ...]]


def every_layout(ranks: Iterable[int]) -> list[Case]:
    """Every way to spread so many ranks over the axes."""
    sizes = product(range(1, max(ranks) + 1), repeat=len(AXES))
    return [Case(**dict(zip(AXES, each, strict=True))) for each in sizes if prod(each) in ranks]


def shared_choices(layout: Case) -> Choices:
    """What any family leaves to choose."""
    return {
        "zero": (1, 2, 3) if layout.shard * layout.context > 1 else (3,),
        "recompute": RECOMPUTE,
        "context_form": get_args(ContextForm) if layout.context > 1 else ("ring",),
        "schedule": get_args(Schedule) if layout.pipeline > 1 else ("1f1b",),
        "accumulation": (1, 2) if layout.pipeline > 1 else (1, 4),
    }


def dense_choices(layout: Case) -> Choices:
    """What a layout of a dense model leaves to choose."""
    either = (False, True)
    return shared_choices(layout) | {"family": DENSE_FAMILIES, "tied": either, "documents": either}


def mixture_choices(layout: Case) -> Choices:
    """What a layout of a mixture leaves to choose; nothing where the mixtures at hand cannot be spread like that."""
    cells, spread = layout.context * layout.tensor, layout.shard * layout.context * layout.tensor
    if layout.ranks.bit_count() > 1 or layout.tensor > MIXTURE_HEADS or 2 * cells > MIXTURE_SEQUENCE:
        return {}
    choices = shared_choices(layout)
    if cells > MIXTURE_HEADS:
        choices["context_form"] = ("ring",)
    choices["schedule"] = tuple(
        name
        for name in choices["schedule"]
        for staged in [replace(layout, schedule=name)]
        if staged.stages <= MIXTURE_LAYERS and staged.data_size * staged.microbatches <= MIXTURE_BATCH
    )
    sizes = tuple(size for size in (1, 2, 4, 8) if spread % size == 0)
    return choices | {"family": tuple(MIXTURES), "expert": sizes} if choices["schedule"] else {}


def settled(case: Case) -> Case:
    """The case, or the nearest one where two of its choices do not go together."""
    if case.schedule in SPLIT_BACKWARD and case.shard * case.context > 1:
        case = replace(case, zero=1)
    while case.family in MIXTURES and case.data_size * case.microbatches > MIXTURE_BATCH:
        case = replace(case, accumulation=case.accumulation // 2)
    return case


# --- Which cases to try ---------------------------------------------------------------------------------------------


def pairs(layout: Case, choices: Choices) -> set[Any]:
    """Every two of a layout's axes in use and of the choices that it leaves."""
    axes = [(axis, "in use") for axis in AXES if getattr(layout, axis) > 1]
    items = [*axes, *((name, value) for name, values in choices.items() for value in values)]
    both = {(one, other) for one, other in combinations(items, 2) if one[0] != other[0]}
    never = {(("zero", zero), ("schedule", name)) for zero in (2, 3) for name in SPLIT_BACKWARD}
    return both - never if layout.shard * layout.context > 1 else both


def pairs_of(case: Case, choices: Choices) -> set[Any]:
    """The pairs that a case holds."""
    return pairs(case, {name: (getattr(case, name),) for name in choices})


def fast_cases(layouts: dict[Case, Choices], about: Container[str]) -> list[Case]:
    """Cases that hold every pair with one of `about` in it: again and again, of some with a pair that is missing, the
    one with most of those a rank."""
    random = Random(12)  # of fourteen the one with fewest ranks
    offered = {layout: pairs(layout, choices) for layout, choices in layouts.items()}
    missing = {pair for pair in set().union(*offered.values()) if any(name in about for name, _ in pair)}
    chosen: list[Case] = []
    while missing:
        wanted = min(missing, key=repr)
        tries: dict[Case, set[Any]] = {}
        for layout in [*layouts] * DRAWS:
            if wanted in offered[layout]:
                given = {name: value for name, value in wanted if name in layouts[layout]}
                drawn = {name: random.choice(values) for name, values in layouts[layout].items()} | given
                case = settled(replace(layout, **drawn))
                tries[case] = pairs_of(case, layouts[layout]) & missing
        chosen.append(max(tries, key=lambda case: len(tries[case]) / case.ranks))
        assert tries[chosen[-1]], f"no case holds {wanted}"
        missing -= tries[chosen[-1]]
    return chosen


def slow_cases(layouts: dict[Case, Choices], rounds: int) -> list[Case]:
    """Every layout in so many cases, its choices taken in turns, which begin anywhere."""
    chosen: dict[Case, None] = {}
    for layout, choices in layouts.items():
        random = Random(str(layout))
        turns = {name: islice(cycle(random.sample(values, len(values))), rounds) for name, values in choices.items()}
        for drawn in zip(*turns.values(), strict=True):
            chosen[settled(replace(layout, **dict(zip(turns, drawn, strict=True))))] = None
    return list(chosen)


LAYOUTS = every_layout(range(2, MOST_RANKS + 1))
DENSE = {layout: dense_choices(layout) for layout in LAYOUTS}
SPARSE = {layout: choices for layout in (Case(), *LAYOUTS) if (choices := mixture_choices(layout))}
# Four ranks show every two choices together. Experts are divided or not; what else two choices do to each other, dense
# models show.
FEW = {layout: choices for layout, choices in DENSE.items() if layout.ranks <= 4}
DIVIDED = {
    layout: choices | {"expert": choices["expert"][:2]} for layout, choices in SPARSE.items() if layout.ranks <= 4
}
FAST = [*fast_cases(FEW, {*AXES, *dense_choices(Case())}), *fast_cases(DIVIDED, {"expert"})]
# Eight ranks by name, and every layout.
NAMED = [
    *(settled(Case(pipeline=2, shard=2, tensor=2, schedule=schedule)) for schedule in get_args(Schedule)),
    Case(pipeline=2, replica=2, shard=2, schedule="interleaved", tied=True),
    Case(context=2, tensor=2, shard=2, documents=True, recompute="selective"),
    Case(family="mixtral", pipeline=2, shard=4, expert=4, recompute="full"),
    Case(family="shared", shard=2, context=2, tensor=2, expert=4, accumulation=4),
]
SLOW = list(dict.fromkeys([*NAMED, *slow_cases(DENSE, 2), *slow_cases(SPARSE, 2)]))
