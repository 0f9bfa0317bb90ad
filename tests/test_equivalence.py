"""Every layout equals one process: samples, outputs, losses, norms, each gradient, and the weights after five steps.

The cases are made from the axes (tests/cases.py): a few, which `make test` runs, and every layout, by `make test-all`.
"""

from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from cases import DENSE_FAMILIES, FAST, LAYOUTS, RECOMPUTE, SLOW, Case, build_job
from mixtures import MIXTURES
from ranks import run_ranks
from verifying import References, assert_agrees, verdict_of

from meshwright.data import open_stream, to_tensors
from meshwright.models import build_model, initialize_
from meshwright.parallel import build_loss, build_mesh, build_parallel_model, start_distributed, stop_distributed
from meshwright.spec import AXES, ContextForm, Job, Schedule
from meshwright.train.evaluate import evaluate


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
@pytest.mark.parametrize("case", [case for case in SLOW if case not in FAST], ids=str)
def test_every_layout_equals_one_process(compare: Any, case: Case) -> None:
    compare(case)


# --- What the cases hold --------------------------------------------------------------------------------------------


def held(cases: list[Case], **wanted: Any) -> bool:
    """Whether one of the cases has these axes alone, or at least these settings."""
    sizes = {axis: wanted.get(axis, 1) for axis in AXES} if wanted.keys() & {*AXES} else {}
    return any(asdict(case).items() >= (sizes | wanted).items() for case in cases)


def test_fast_cases_hold_each_axis_and_every_two() -> None:
    for axis in AXES:
        assert any(case.ranks == getattr(case, axis) > 1 for case in FAST), axis
    for one, other in combinations([*AXES, "expert"], 2):
        assert any(getattr(case, one) > 1 and getattr(case, other) > 1 for case in FAST), (one, other)
    for setting, values in (
        ("schedule", get_args(Schedule)),
        ("context_form", get_args(ContextForm)),
        ("recompute", RECOMPUTE),
        ("zero", (1, 2, 3)),
        ("accumulation", (1, 2, 4)),
        ("family", (*DENSE_FAMILIES, *MIXTURES)),
    ):
        for value in values:
            assert held(FAST, **{setting: value}), (setting, value)


def test_slow_cases_hold_every_layout() -> None:
    every = FAST + SLOW
    assert all(held(every, **{axis: getattr(layout, axis) for axis in AXES}) for layout in LAYOUTS)
    for schedule in get_args(Schedule):
        assert held(every, shard=2, tensor=2, pipeline=2, schedule=schedule)
    assert held(every, replica=2, shard=2, pipeline=2, schedule="interleaved")
    assert held(every, context=2, tensor=2, shard=2)
    assert held(every, pipeline=2, shard=4, expert=4)
    assert held(every, shard=2, context=2, tensor=2, expert=4)


# --- What the axes do not show --------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["shard", "tensor"])
def test_tied_embeddings_and_uneven_parts(compare: Any, axis: str) -> None:
    sizes: Any = {axis: 3}
    compare(Case(tied=True, **sizes))


def test_another_order_of_axes(compare: Any) -> None:
    order = ["tensor", "pipeline", "shard", "context", "replica"]
    compare(Case(replica=2, shard=2, tensor=2), layout={"order": order})


def test_a_window_over_documents(compare: Any) -> None:
    compare(Case(family="mistral", shard=2, tensor=2, documents=True))


@pytest.mark.parametrize("kv_heads", [1, 8, *(pytest.param(heads, marks=pytest.mark.slow) for heads in (2, 4))])
def test_key_heads_shared_by_ranks_or_several_a_rank(compare: Any, kv_heads: int) -> None:
    compare(Case(tensor=4), model={"kv_heads": kv_heads})


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
    job = build_job(folder, Case(accumulation=accumulation, **axes), evaluation={"sequences": sequences})
    expected = pytest.approx(held_out_alone(job), rel=1e-6)
    assert run_ranks(job.layout.world_size, evaluate_rank, job) == [expected] * job.layout.world_size
