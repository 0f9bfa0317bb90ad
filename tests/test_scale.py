"""Layouts of more ranks than any machine here has, built rank by rank on process groups that carry nothing: the bytes
that a rank would hold are those predicted, to the byte."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.testing._internal.distributed.fake_pg import FakeStore

from meshwright.account import MemoryAccount
from meshwright.parallel import apply, build_mesh, build_parallel_model
from meshwright.plan import predict_states
from meshwright.spec import Job
from meshwright.spec.decode import planning_job
from meshwright.trace.memory import tensor_bytes
from meshwright.train.optimizer import build_optimizer


def hold(job: Job, rank: int) -> MemoryAccount:
    """What a rank of the job's world holds after a step, of tensors without memory."""
    dist.init_process_group("fake", rank=rank, world_size=job.layout.world_size, store=FakeStore())
    with mock.patch.object(apply, "fill"):
        model = build_parallel_model(job, build_mesh(job.layout, torch.device("cpu")), torch.device("meta"))
    optimizer = build_optimizer(model, job.optimizer)
    for group in optimizer.groups:
        group["fused"] = False  # which wants memory
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(parameter.is_meta for parameter in model.parameters())
    return MemoryAccount(
        parameters=tensor_bytes(model.parameters()),
        gradients=tensor_bytes(parameter.grad for parameter in model.parameters()),
        optimizer_states=tensor_bytes(value for p in model.parameters() for value in optimizer.states(p).values()),
    )


SMALL = [
    "layout.pipeline=2",
    "layout.shard=4",
    "layout.context=2",
    "layout.tensor=2",
    "layout.schedule=interleaved",
]
TURNING = ["layout.pipeline=2", "layout.shard=16", "layout.schedule=zbv", "layout.zero=1"]
EXPERTS = ["layout.pipeline=8", "layout.replica=2", "layout.shard=32", "layout.tensor=2", "layout.expert=16"]
LARGE = ["layout.pipeline=8", "layout.replica=2", "layout.shard=16", "layout.tensor=4", "layout.schedule=interleaved"]
# First and last of a stage, and places where shards are uneven.
CASES: list[tuple[str, str, list[str], list[int]]] = [
    ("llama3.2-1b", "32xh100", SMALL, [0, 15, 16, 31, 5]),
    ("gpt2-124m", "32xh100", TURNING, [0, 31, 11]),
    ("llama3-70b", "128x8xh100", LARGE, [0, 1023, 517, 128, 890]),
    ("llama3-8b", "128x8xh100", ["layout.shard=37", "layout.tensor=8", "layout.replica=3"], [0, 295, 887]),
    (
        "mixtral-8x7b",
        "32xh100",
        ["layout.shard=4", "layout.context=2", "layout.tensor=4", "layout.expert=4"],
        [0, 31, 13],
    ),
    ("qwen3-30b-a3b", "128x8xh100", EXPERTS, [0, 1023, 300]),
]


@pytest.mark.parametrize(
    ("model", "gpus", "settings", "rank"),
    [(model, gpus, settings, rank) for model, gpus, settings, ranks in CASES for rank in ranks],
    ids=lambda value: str(value) if isinstance(value, str | int) else "",
)
def test_a_rank_holds_what_is_predicted(model: str, gpus: str, settings: list[str], rank: int) -> None:
    job = planning_job(model=model, gpus=gpus, sequence=1024, global_batch=16 * 16 * 37 * 3, settings=settings)
    # A process of its own: groups and meshes of one rank are not those of another.
    (held,) = run_ranks(1, hold, job, rank)
    assert held == predict_states(job, rank)
