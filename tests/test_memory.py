"""State bytes: what each rank measures in a running job is what the planner counts, exactly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import tiny_job
from ranks import run_ranks
from training import new_run, train_rank

from meshwright.account import MemoryAccount
from meshwright.plan import predict_memory
from meshwright.plan.activations import peak_bytes, stage_activations, tables_bytes
from meshwright.plan.frame import build_frame
from meshwright.record import Memory, read_events
from meshwright.spec import Job

STATES = ("parameters", "gradients", "optimizer_states")
LAYOUTS: list[dict[str, int]] = [
    {},
    {"replica": 2},
    *({"shard": 2, "zero": zero} for zero in (1, 2, 3)),
    {"shard": 3},
    {"replica": 2, "shard": 2, "zero": 2},
    {"shard": 4, "zero": 1},
    {"tensor": 2},
    {"tensor": 2, "shard": 2},
    {"tensor": 2, "replica": 2},
    # More ranks than key heads, which they share.
    {"tensor": 4},
]
# What another family changes: biases, a table of positions, a tied head; norms of heads.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2", "kv_heads": 4, "max_positions": 24, "tied_embeddings": True},
    "qwen3": {"family": "qwen3"},
}


def measured(job: Job) -> dict[int, MemoryAccount]:
    """Each rank's memory account of a run of three steps."""
    folder, attempt = new_run(job)
    run_ranks(job.layout.world_size, train_rank, job, folder, attempt)
    events = read_events(folder, attempt)
    found = {rank: [line for line in lines if isinstance(line, Memory)] for rank, lines in events.items()}
    assert all(len(lines) == 1 and lines[0].step == 1 for lines in found.values())
    return {rank: lines[0].account for rank, lines in found.items()}


def a_job(folder: Path, layout: dict[str, int], name: str, **model: Any) -> Job:
    data, tensor = layout.get("replica", 1) * layout.get("shard", 1), layout.get("tensor", 1)
    # 257 rows and 90 columns: neither 2, 3 nor 4 divides them all. The tensor axis must divide columns.
    return tiny_job(
        folder,
        processes=data * tensor,
        model={"feed_forward": 92 if tensor > 1 else 90} | model,
        layout=layout | {"microbatch": 2},
        run={"steps": 3},
        data={"global_batch": 4 * data},
        optimizer={"name": name, "learning_rate": 0.01},
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda v: "-".join(f"{k}{n}" for k, n in v.items()) or "one")
def test_measured_states_are_the_predicted_ones(tmp_path: Path, layout: dict[str, int]) -> None:
    job = a_job(tmp_path, layout, "adamw")
    accounts = measured(job)
    predicted = predict_memory(job)
    for state in STATES:
        # The plan is about the fullest rank; nobody holds more, and together they hold the model.
        assert max(getattr(account, state) for account in accounts.values()) == getattr(predicted, state), state
        assert getattr(accounts[0], state) == getattr(predicted, state), state
    if job.layout.tensor > 1:
        return  # norms are on every rank
    whole = sum(account.parameters for account in accounts.values()) / layout.get("replica", 1)
    assert whole == predict_memory(a_job(tmp_path, {}, "adamw")).parameters


@pytest.mark.parametrize("layout", [{"shard": 2}, {"tensor": 2}], ids=["shard", "tensor"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_states_too(tmp_path: Path, family: str, layout: dict[str, int]) -> None:
    job = a_job(tmp_path, layout, "adamw", **FAMILIES[family])
    accounts, predicted = measured(job), predict_memory(job)
    for state in STATES:
        assert getattr(accounts[0], state) == getattr(predicted, state), state


def test_sgd_holds_no_states(tmp_path: Path) -> None:
    job = a_job(tmp_path, {}, "sgd")
    assert measured(job)[0].optimizer_states == predict_memory(job).optimizer_states == 0


def test_watching_memory_changes_nothing(tmp_path: Path) -> None:
    """Tensors saved for backward are counted as they pass: no account is negative, and the logits are all there."""
    job = a_job(tmp_path, {}, "adamw")
    account = measured(job)[0]
    assert all(value >= 0 for _, value in account.rows())
    logits = job.layout.microbatch * job.data.sequence * job.model.vocabulary * torch.float32.itemsize
    assert account.logits >= 2 * logits
    assert account.activations > 0


@pytest.mark.parametrize(
    "layout",
    [
        {"schedule": "gpipe"},
        {"schedule": "1f1b", "recompute": "full"},
        {"schedule": "interleaved"},
        {"schedule": "zero-bubble"},
        {"schedule": "zero-bubble", "recompute": "full"},
        {"schedule": "zbv"},
        {"schedule": "dualpipev"},
    ],
    ids=lambda v: "-".join(map(str, v.values())),
)
def test_a_pipeline_keeps_what_is_predicted(tmp_path: Path, layout: dict[str, Any]) -> None:
    """At the moment at which a rank's stages hold most together; products that are put off count."""
    job = tiny_job(
        tmp_path,
        processes=2,
        # So large that a block's tensors, while it runs again, are fewer than the loss's.
        model={"layers": 5, "vocabulary": 900},
        data={"global_batch": 8},
        layout={"pipeline": 2, "microbatch": 1, "zero": 1, **layout},
        run={"steps": 2},
    )
    accounts, frame = measured(job), build_frame(job)
    for part in frame.parts:
        alive = frame.timetable.alive[part.rank]
        activations, logits, _ = peak_bytes(job, part, alive)
        assert accounts[part.rank].logits == logits, part.rank
        found = accounts[part.rank].activations
        most = max(sum(moment.kept) for moment in alive)
        head = any(stage.head for stage in part.stages)
        if job.layout.recompute != "none":
            # Not watched: the tables that blocks run again with, and, where no loss's tensors are more, one that does.
            again = 0.0 if head else max(stage_activations(job, part.cut, stage).again for stage in part.stages)
            assert activations - again - most * tables_bytes(job) <= found <= activations, part.rank
            continue
        # The loss keeps its targets, and the sum of what counts.
        targets = most * (8 * job.data.sequence + 4) if head else 0
        assert activations <= found <= activations + targets, part.rank


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_logits_of_all_microbatches_that_wait_are_counted(tmp_path: Path, schedule: str) -> None:
    """With gpipe each microbatch's are kept until its backward pass, as planned; with 1f1b those of one."""
    layout = {"pipeline": 2, "schedule": schedule, "microbatch": 1}
    job = tiny_job(
        tmp_path, processes=2, model={"layers": 2}, layout=layout, run={"steps": 3}, data={"global_batch": 4}
    )
    last, predicted = measured(job)[1], predict_memory(job)
    one = job.data.sequence * job.model.vocabulary * torch.float32.itemsize
    assert last.logits == (6 if schedule == "gpipe" else 3) * one
    # The plan is about the fullest rank: with gpipe, and logits as large as these, the last one.
    assert schedule == "1f1b" or predicted.logits == last.logits
    assert schedule == "1f1b" or last.activations == pytest.approx(predicted.activations, rel=0.02)
