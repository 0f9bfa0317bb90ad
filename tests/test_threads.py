"""A rank's threads: its part of the machine's cores where they do the work, torch's own choice where a GPU does."""

import os
from unittest import mock

import msgspec
import pytest
import torch
from jobs import cpu_cluster
from ranks import run_ranks

from meshwright.spec import Job
from meshwright.spec.decode import planning_job
from meshwright.train.worker import settle_process

CORES = 32
# What torch might have chosen by itself.
BEFORE = 5


def threads_of(job: Job) -> int:
    """A rank's, once its process is settled on a large machine."""
    torch.set_num_threads(BEFORE)
    with mock.patch.object(os, "cpu_count", return_value=CORES):
        settle_process(job)
    return torch.get_num_threads()


@pytest.mark.parametrize(
    ("gpus", "shard", "offload", "threads"),
    [
        ("8xh100", 8, "parameters", CORES // 8),
        # Fewer ranks than GPUs, and two nodes full of them.
        ("8xh100", 2, "parameters", CORES // 2),
        ("2x8xh100", 16, "parameters", CORES // 8),
        ("8xh100", 8, "optimizer", BEFORE),
        ("8xh100", 8, "none", BEFORE),
    ],
)
def test_cores_are_shared_where_they_update_parameters(gpus: str, shard: int, offload: str, threads: int) -> None:
    settings = [f"layout.shard={shard}", f"layout.offload={offload}"]
    job = planning_job(model="llama3-8b", gpus=gpus, sequence=1024, global_batch=16, settings=settings)
    assert run_ranks(1, threads_of, job) == [threads]


def test_cores_are_shared_by_processes() -> None:
    job = planning_job(model="llama3-8b", gpus="8xh100", sequence=1024, global_batch=16, settings=["layout.shard=4"])
    assert run_ranks(1, threads_of, msgspec.structs.replace(job, cluster=cpu_cluster(4))) == [CORES // 4]
