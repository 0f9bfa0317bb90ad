"""The pipeline axis: every schedule, alone and with other axes, equals one process; what planted faults look like."""

from pathlib import Path
from typing import Any

import pytest
from jobs import tiny_job
from verifying import References, assert_agrees, verdict_of

from meshwright.launch.shrink import write_text
from meshwright.spec import Job

SPLIT = ("zero-bubble", "zbv", "dualpipev")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    write_text(folder)
    return folder


@pytest.fixture(scope="module")
def references(folder: Path) -> References:
    return References(folder)


def pipelined(folder: Path, runs: Path, layout: dict[str, Any], **sections: dict[str, Any]) -> Job:
    """A job with more microbatches than stages, and layers that no number of stages divides."""
    data = layout.get("replica", 1) * layout.get("shard", 1)
    world = data * layout["pipeline"] * layout.get("tensor", 1)
    table: dict[str, dict[str, Any]] = {
        "run": {"folder": str(runs)},
        "model": {"layers": 9, "vocabulary": 263},
        "data": {"global_batch": 8 * data},
        "layout": {"microbatch": 1, "zero": 1 if layout.get("schedule") in SPLIT else 3, **layout},
    }
    for name, section in sections.items():
        table[name] = table.get(name, {}) | section
    return tiny_job(folder, processes=world, **table)


LAYOUTS: list[dict[str, Any]] = [
    {"pipeline": 2},
    {"pipeline": 3, "schedule": "gpipe"},
    {"pipeline": 2, "schedule": "interleaved"},
    {"pipeline": 2, "schedule": "interleaved", "stages_per_rank": 3},
    {"pipeline": 2, "schedule": "zero-bubble"},
    {"pipeline": 2, "schedule": "zbv"},
    {"pipeline": 2, "schedule": "dualpipev"},
    {"pipeline": 3, "stage_layers": [1, 2, 6]},
    {"pipeline": 2, "shard": 2, "zero": 2},
    {"pipeline": 2, "shard": 2, "zero": 1, "recompute": "full"},
    {"pipeline": 2, "shard": 2, "schedule": "zbv", "recompute": "selective"},
    {"pipeline": 2, "replica": 2, "schedule": "interleaved", "recompute": 4},
    {"pipeline": 2, "tensor": 2, "schedule": "zero-bubble"},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda v: "-".join(f"{name}_{value}" for name, value in v.items()))
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_pipeline_equals_one_process(
    folder: Path, tmp_path: Path, references: References, layout: dict[str, Any], tied: bool
) -> None:
    job = pipelined(folder, tmp_path, layout, model={"tied_embeddings": tied})
    assert_agrees(verdict_of(job, references))


@pytest.mark.parametrize(
    ("layout", "sections"),
    [
        # gpt2's table of positions is in the first stage alone; documents are known in all of them.
        ({"pipeline": 2, "tensor": 2}, {"model": {"family": "gpt2", "kv_heads": 4, "max_positions": 24}}),
        ({"pipeline": 2, "schedule": "zbv"}, {"data": {"attention": "document"}}),
        ({"pipeline": 2}, {"model": {"family": "mistral", "attention_window": 7}}),
        ({"pipeline": 2, "order": ["replica", "shard", "context", "tensor", "pipeline"], "shard": 2}, {}),
        ({"pipeline": 2, "microbatch": 2}, {}),
    ],
    ids=["learned-positions", "documents", "window", "order", "microbatch"],
)
def test_what_a_stage_is_told_equals_one_process(
    folder: Path, tmp_path: Path, references: References, layout: dict[str, Any], sections: dict[str, Any]
) -> None:
    assert_agrees(verdict_of(pipelined(folder, tmp_path, layout, **sections), references))
