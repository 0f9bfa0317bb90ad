"""Every layout equals one process: samples, outputs, losses, norms, each gradient, and the weights after five steps.

The cases are made from the axes, not typed. All of them are too many: the fast ones, which `make test` runs, put every
two of the axes in use and the settings together once; the slow ones, which `make test-all` adds, run every layout with
each zero and recompute policy, and take accumulation and family in turn, so that each layout meets all of those too.
"""

from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from jobs import tiny_job
from ranks import run_ranks
from verifying import References, assert_agrees, verdict_of

from meshwright.data import open_stream, to_tensors
from meshwright.launch.shrink import write_text
from meshwright.models import build_model, initialize_
from meshwright.parallel import build_loss, build_mesh, build_parallel_model, start_distributed, stop_distributed
from meshwright.spec import BUILT_FAMILIES, FAMILIES, FamilyName, Job
from meshwright.train.evaluate import evaluate

PROCESSES = range(2, 9)
ACCUMULATIONS = (1, 4)
RECOMPUTE = ("none", "selective", "full", 1)
# Mixtures have layouts of their own: test_experts.py.
DENSE_FAMILIES = [family for family in BUILT_FAMILIES if not FAMILIES[family].mixture]
# Query heads to key heads: key heads are shared by ranks at tensor 4 and above, but for tensor 3 and gpt2.
KV_HEADS = {8: 2, 7: 1, 6: 3, 5: 1}


class Case(NamedTuple):
    """A layout, and the model and batch that it is tried with."""

    replica: int
    shard: int
    tensor: int
    zero: int
    accumulation: int
    recompute: str | int
    family: FamilyName

    @property
    def processes(self) -> int:
        return self.replica * self.shard * self.tensor

    def __str__(self) -> str:
        axes = "-".join(f"{name}{getattr(self, name)}" for name in ("replica", "shard", "tensor"))
        return f"{self.family}-{axes}-zero{self.zero}-accumulation{self.accumulation}-{self.recompute}"

    def choices(self) -> set[Any]:
        """What a selection must hold once: each number of ranks, and each pair of axes in use and settings."""
        axes = (self.replica > 1, self.shard > 1, self.tensor > 1)
        settings = [(name, getattr(self, name)) for name in ("zero", "accumulation", "recompute", "family")]
        return {self.processes, *combinations([("axes", axes), *settings], 2)}


def every_case() -> list[Case]:
    """The whole product. Without a shard axis there is one zero."""
    return [
        Case._make((*sizes, zero, *settings))
        for sizes in product(range(1, 9), repeat=3)
        if sizes[0] * sizes[1] * sizes[2] in PROCESSES
        for zero in ((1, 2, 3) if sizes[1] > 1 else (3,))
        for settings in product(ACCUMULATIONS, RECOMPUTE, DENSE_FAMILIES)
    ]


def fast_cases(cases: list[Case]) -> list[Case]:
    """Cases that hold every choice between them: again and again the one with most new choices a rank."""
    choices = {case: case.choices() for case in cases}
    missing: set[Any] = set().union(*choices.values())
    chosen: list[Case] = []
    while missing:
        chosen.append(max(cases, key=lambda case: len(choices[case] & missing) / case.processes))
        missing -= choices[chosen[-1]]
    return chosen


def slow_cases(cases: list[Case]) -> list[Case]:
    """Every layout, zero and recompute policy, with the accumulation and the family whose turns they are."""
    layouts = list(dict.fromkeys((*case[:4], case.recompute) for case in cases))
    assert len(RECOMPUTE) == len(DENSE_FAMILIES)
    chosen: list[Case] = []
    for number, (*sizes, recompute) in enumerate(layouts):
        # Another family for each of a layout's policies, and another first one for the next layout.
        row = number // len(RECOMPUTE)
        family = DENSE_FAMILIES[(number + row) % len(DENSE_FAMILIES)]
        accumulation = ACCUMULATIONS[(number + row // len(DENSE_FAMILIES)) % len(ACCUMULATIONS)]
        chosen.append(Case._make((*sizes, accumulation, recompute, family)))
    return chosen


CASES = every_case()
FAST = fast_cases(CASES)
SLOW = [case for case in slow_cases(CASES) if case not in FAST]


def build_job(folder: Path, case: Case, **sections: dict[str, Any]) -> Job:
    """A job of the case's layout on the smallest model and batch that it divides."""
    heads = 8 // case.tensor * case.tensor
    learned = case.family == "gpt2"
    sequence = 32 // case.tensor * case.tensor
    data_size = case.replica * case.shard
    batch = data_size * 4 * max(1, 8 // data_size)
    layout = {name: getattr(case, name) for name in ("replica", "shard", "tensor", "zero", "recompute")}
    table: dict[str, dict[str, Any]] = {
        "model": {
            "family": case.family,
            # No multiple of the sizes of shard: ranks hold unequal parts.
            "d_model": 36,
            "heads": heads,
            "kv_heads": heads if learned else KV_HEADS[heads],
            "head_dim": 8,
            "feed_forward": 45 * heads,
            # Prime: uneven along tensor and shard. More than the 257 byte tokens.
            "vocabulary": 263,
            "max_positions": sequence if learned else 0,
            "attention_window": 17 if case.family == "mistral" else 0,
            "tied_embeddings": learned,
        },
        "data": {"sequence": sequence, "global_batch": batch},
        "layout": {**layout, "microbatch": batch // (data_size * case.accumulation)},
    }
    for name, section in sections.items():
        table[name] = table.get(name, {}) | section
    return tiny_job(folder, processes=case.processes, **table)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where text, tokens and runs are, for all cases."""
    folder = tmp_path_factory.mktemp("equivalence")
    write_text(folder)
    return folder


@pytest.fixture(scope="module")
def references(folder: Path) -> References:
    return References(folder)


@pytest.fixture
def compare(folder: Path, references: References, tmp_path: Path) -> Any:
    """Run a case and fail if it differs from one process."""

    def run(case: Case, **sections: dict[str, Any]) -> None:
        job = build_job(folder, case, run={"folder": str(tmp_path)}, **sections)
        assert_agrees(verdict_of(job, references))

    return run


@pytest.mark.parametrize("case", FAST, ids=str)
def test_layout_equals_one_process(compare: Any, case: Case) -> None:
    compare(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=str)
def test_every_layout_equals_one_process(compare: Any, case: Case) -> None:
    compare(case)


def test_selections_hold_what_they_say() -> None:
    assert set().union(*(case.choices() for case in FAST)) == set().union(*(case.choices() for case in CASES))
    everything = {*FAST, *SLOW}
    for setting in ("accumulation", "recompute", "family"):
        tried = {(*case[:4], getattr(case, setting)) for case in everything}
        assert tried == {(*case[:4], getattr(case, setting)) for case in CASES}


def case_of(*, family: FamilyName = "llama", accumulation: int = 1, **axes: int) -> Case:
    sizes = {"replica": 1, "shard": 1, "tensor": 1, "zero": 3} | axes
    return Case(**sizes, accumulation=accumulation, recompute="none", family=family)


@pytest.mark.parametrize("axis", ["shard", "tensor"])
def test_tied_embeddings_and_uneven_parts(compare: Any, axis: str) -> None:
    sizes: Any = {axis: 3}
    compare(case_of(**sizes), model={"tied_embeddings": True})


def test_untied_head_of_learned_positions(compare: Any) -> None:
    compare(case_of(tensor=2, family="gpt2"), model={"tied_embeddings": False})


def test_another_order_of_axes(compare: Any) -> None:
    order = ["tensor", "pipeline", "shard", "context", "replica"]
    compare(case_of(replica=2, shard=2, tensor=2), layout={"order": order})


@pytest.mark.parametrize(
    "axes", [{"replica": 2}, {"shard": 2, "accumulation": 4}, {"tensor": 2}, {"tensor": 4}], ids=str
)
def test_documents_that_do_not_see_each_other(compare: Any, axes: Any) -> None:
    compare(case_of(**axes), data={"attention": "document"})


def test_a_window_over_documents(compare: Any) -> None:
    compare(case_of(shard=2, tensor=2, family="mistral"), data={"attention": "document"})


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_key_heads_shared_by_ranks_or_several_a_rank(compare: Any, kv_heads: int) -> None:
    compare(case_of(tensor=4), model={"kv_heads": kv_heads})


# --- The held-out loss ----------------------------------------------------------------------------------------------


def evaluate_rank(job: Job) -> float | None:
    """The held-out loss of the initial model, as the trainer takes it."""
    torch.set_num_threads(1)
    device = start_distributed(job.cluster)
    mesh = build_mesh(job.layout, device)
    model = build_parallel_model(job, mesh, device)
    found = evaluate(model, build_loss(job, mesh, device), open_stream(job), job, mesh, device)
    stop_distributed()
    return found


@torch.no_grad()
def held_out_alone(job: Job) -> float:
    """The same sample by sample, in one process."""
    model, stream = build_model(job.model, "cpu"), open_stream(job)
    initialize_(model, job.model, job.run.seed)
    total, counted = 0.0, 0
    for index in range(job.evaluation.sequences):
        batch = to_tensors(stream.held_out_batch(index, 1), torch.device("cpu"))
        total += F.cross_entropy(model(batch.tokens)[0].double(), batch.targets[0], reduction="sum").item()
        counted += int((batch.targets != -100).sum())
    return total / counted


@pytest.mark.parametrize("axes", [{"shard": 2}, {"replica": 2, "tensor": 2}, {"shard": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize(("sequences", "accumulation"), [(3, 16), (3, 8), (3, 4), (8, 4)])
def test_held_out_loss_equals_one_process(folder: Path, axes: Any, sequences: int, accumulation: int) -> None:
    """Where samples do not fill the last batch of all ranks, or not even one of a rank's own, and where they do."""
    job = build_job(folder, case_of(accumulation=accumulation, **axes), evaluation={"sequences": sequences})
    expected = pytest.approx(held_out_alone(job), rel=1e-6)
    assert run_ranks(job.layout.world_size, evaluate_rank, job) == [expected] * job.layout.world_size
