"""One rank by itself, on process groups that carry nothing, against the same rank among the others."""

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.distributed as dist
from jobs import LINK, cpu_cluster, tiny_job
from ranks import run_ranks
from torch.distributed import P2POp
from torch.distributed import _functional_collectives as functional
from training import new_run, train_rank

from meshwright.account import MemoryAccount
from meshwright.parallel import start_silent, stop_distributed
from meshwright.plan import build_paces, predict_states, rank_step
from meshwright.plan.part import STATE_BYTES, build_part
from meshwright.record import Asked, GroupPace, Kind, Memory, Rehearsed, RunFolder, Step, read_events
from meshwright.spec import Job, Link
from meshwright.train.rehearsal import rehearse

STEPS = 3


def alone(job: Job, folder: RunFolder, attempt: int, rank: int, steps: int) -> Rehearsed:
    """A rank's rehearsal, in the test's process."""
    torch.set_num_threads(1)
    device, ledger = start_silent(job.cluster, rank, job.layout.world_size, build_paces(job, rank))
    rehearsed = rehearse(job, folder, attempt, device, ledger, steps)
    stop_distributed()
    return rehearsed


def rehearsed(job: Job, rank: int, steps: int = STEPS) -> tuple[Rehearsed, RunFolder]:
    """What a rank found, and its run folder."""
    folder, attempt = new_run(job)
    (found,) = run_ranks(1, alone, job, folder, attempt, rank, steps)
    return found, folder


def memory_of(folder: RunFolder, rank: int) -> MemoryAccount:
    """What a rank's memory held."""
    (account,) = [event.account for event in read_events(folder, 0)[rank] if isinstance(event, Memory)]
    return account


def named(job: Job, name: str, **run: Any) -> Job:
    """The job under another name."""
    return msgspec.structs.replace(job, run=msgspec.structs.replace(job.run, name=name, **run))


LAYOUTS: dict[str, dict[str, Any]] = {
    "shard": {"shard": 2},
    "shard, zero 1": {"shard": 2, "zero": 1},
    "replica": {"replica": 2},
    "tensor": {"tensor": 2},
    "ring": {"context": 2},
    "exchange": {"context": 2, "context_form": "all-to-all"},
    "pipeline": {"pipeline": 2},
    "pipeline in a V": {"pipeline": 2, "schedule": "zbv"},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("shard", "pipeline") else [pytest.mark.slow]) for name in LAYOUTS]
)
def test_a_rank_holds_by_itself_what_it_holds_among_the_others(tmp_path: Path, name: str) -> None:
    job = tiny_job(
        tmp_path,
        processes=2,
        layout=LAYOUTS[name],
        # Two blocks for each rank of the V.
        model={"layers": 4},
        optimizer={"name": "adamw"},
        run={"steps": STEPS},
        checkpoint={"at_end": False},
    )
    real, attempt = new_run(job)
    run_ranks(2, train_rank, job, real, attempt)
    for rank in range(2):
        _, folder = rehearsed(named(job, f"rank-{rank}"), rank)
        found, wanted = memory_of(folder, rank), memory_of(real, rank)
        apart = {"framework": 0.0, "fragmentation": 0.0}
        # All that is counted by its tensors is the same to the byte.
        assert msgspec.structs.replace(found, **apart) == msgspec.structs.replace(wanted, **apart)
        states = predict_states(job, rank)
        assert (found.parameters, found.gradients) == (states.parameters, states.gradients)
        assert found.optimizer_states == states.optimizer_states > 0
        # gloo and its threads are not there: a few megabytes.
        assert found.total() == pytest.approx(wanted.total(), rel=0.05)


def test_transfers_are_asked_for_as_the_plan_reckons(tmp_path: Path) -> None:
    # An even number of tokens, so that nothing is filled up to be divided.
    job = tiny_job(tmp_path, processes=2, layout={"shard": 2}, model={"vocabulary": 258})
    found, _ = rehearsed(job, 1)
    asked = {one.kind: one for one in found.asked}
    groups, microbatches = build_part(job).groups, 4
    # Forward everything is gathered, backward everything but the head, which has stayed.
    assert asked["all_gather"].size_bytes == microbatches * (2 * groups.whole() - groups.head) * STATE_BYTES
    assert asked["reduce_scatter"].size_bytes == microbatches * groups.whole() * STATE_BYTES
    assert (asked["all_reduce"].size_bytes, asked["all_reduce"].count) == (12, 1)
    predicted = rank_step(job, 1)
    # On a CPU nothing is hidden.
    seconds = asked["all_gather"].seconds + asked["reduce_scatter"].seconds
    assert seconds == pytest.approx(predicted.comm_shard, rel=1e-6)
    assert asked["all_reduce"].seconds == pytest.approx(predicted.comm_control, rel=1e-6)


def test_the_account_has_the_transfers_that_were_predicted(tmp_path: Path) -> None:
    slow = Link(name="slow", bytes_per_s=1e6, latency_s=5e-3, source="made up")
    job = tiny_job(tmp_path, processes=2, layout={"shard": 2}, trace={"every_steps": 6})
    job = msgspec.structs.replace(job, cluster=msgspec.structs.replace(job.cluster, intra=slow))
    found, folder = rehearsed(job, 0, steps=5)
    (step,) = [event for event in read_events(folder, 0)[0] if isinstance(event, Step)]
    account = step.measured.account
    asked_s = sum(one.seconds for one in found.asked if one.kind != "all_reduce")
    # A sleep may end late where others use the cores too, and never early.
    assert 0.99 * asked_s <= account.comm_shard
    assert step.measured.step == 3 and account.closes(step.measured.wall_s, tolerance=0.2)
    assert account.compute > 0 and account.optimizer > 0
    assert found.steps_s[3] >= asked_s


def test_a_rank_of_a_thousand(tmp_path: Path) -> None:
    sizes = {"pipeline": 2, "replica": 4, "shard": 16, "tensor": 8}
    model = {"heads": 8, "kv_heads": 8, "d_model": 64, "feed_forward": 96, "vocabulary": 512}
    job = tiny_job(tmp_path, processes=1024, layout=sizes, model=model, data={"global_batch": 128})
    fast = msgspec.structs.replace(LINK, latency_s=1e-6)
    job = msgspec.structs.replace(
        job, cluster=msgspec.structs.replace(cpu_cluster(8), nodes=128, intra=fast, inter=fast)
    )
    found, folder = rehearsed(job, 517)
    memory, states = memory_of(folder, 517), predict_states(job, 517)
    assert (memory.parameters, memory.gradients) == (states.parameters, states.gradients)
    ranks = {(one.kind, one.ranks) for one in found.asked}
    assert ranks >= {
        ("all_gather", 16),
        ("reduce_scatter", 16),
        ("all_reduce", 4),
        ("all_gather", 8),
        ("reduce_scatter", 8),
        ("send", 2),
        ("all_reduce", 1024),
    }
    assert len(found.steps_s) == STEPS and all(math.isfinite(seconds) for seconds in found.steps_s)


def test_experts_are_sent_as_many_rows_as_they_give(tmp_path: Path) -> None:
    mixture = {"family": "mixtral", "experts": {"count": 4, "per_token": 2, "feed_forward": 30}}
    job = tiny_job(tmp_path, processes=4, layout={"shard": 2, "tensor": 2, "expert": 2}, model=mixture)
    found, folder = rehearsed(job, 3)
    states = predict_states(job, 3)
    assert memory_of(folder, 3).parameters == states.parameters
    # Counts, rows there and back, and their gradients; two layers, two microbatches.
    assert {one.kind: one.count for one in found.asked}["all_to_all"] == 5 * 2 * 4


FREE = ((0.0, 0.0), (1.0, 0.0))
KINDS: tuple[Kind, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "pass")


def exchange() -> tuple[dict[str, list[float]], tuple[Asked, ...]]:
    """What rank 1 of three gets of each kind of transfer."""
    world = GroupPace(ranks=(0, 1, 2), curves=dict.fromkeys(KINDS, FREE))
    pairs = [GroupPace(ranks=ranks, curves={"send": FREE}) for ranks in ((0, 1), (1, 2))]
    _, ledger = start_silent(cpu_cluster(3), 1, 3, [world, *pairs])
    group = dist.group.WORLD
    assert group is not None
    mine, name, made = torch.tensor([1.0, 2.0, 3.0]), group.group_name, torch.ops._c10d_functional
    found = {
        "gathered": made.all_gather_into_tensor(mine, 3, name),
        "scattered": made.reduce_scatter_tensor(mine, "sum", 3, name),
        "summed": made.all_reduce(mine, "sum", name),
        "exchanged": made.all_to_all_single(mine, [1, 2, 4], [1, 1, 1], name),
        "nothing given": made.all_to_all_single(mine[:0], [1, 0, 0], [0, 0, 0], name),
    }
    values = {what: functional.wait_tensor(tensor).tolist() for what, tensor in found.items()}
    passed, received = torch.full((3,), math.nan), torch.full((100,), math.nan)
    turn = dist.all_to_all_single(passed, mine, [3, 0, 0], [0, 0, 3], async_op=True)
    assert turn is not None
    for work in (turn, *dist.batch_isend_irecv([P2POp(dist.irecv, received, 0), P2POp(dist.isend, mine, 2)])):
        work.wait()
    dist.barrier()
    dist.broadcast(mine, 0)
    values |= {"passed": passed.tolist(), "received": [float(received.isfinite().all()), float(received.std() > 0)]}
    asked = ledger.asked()
    ledger.clear()
    assert ledger.asked() == ()
    stop_distributed()
    return values, asked


def test_what_comes_from_nobody_is_made_of_its_own_numbers() -> None:
    ((values, asked),) = run_ranks(1, exchange)
    assert values == {
        "gathered": [1.0, 2.0, 3.0] * 3,
        "scattered": [2.0],
        "summed": [1.0, 2.0, 3.0],
        "exchanged": [1.0, 2.0, 3.0, 1.0, 2.0, 3.0, 1.0],
        "nothing given": [0.0],
        "passed": [1.0, 2.0, 3.0],
        "received": [1.0, 1.0],
    }
    told = {(one.kind, one.ranks): (one.count, one.size_bytes) for one in asked}
    assert told == {
        ("all_gather", 3): (1, 36.0),
        ("reduce_scatter", 3): (1, 12.0),
        ("all_reduce", 3): (1, 12.0),
        ("all_to_all", 3): (2, 12.0),
        ("pass", 3): (1, 12.0),
        ("send", 2): (1, 12.0),
    }
