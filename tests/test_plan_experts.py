"""Predictions of mixtures: what is sent to experts, over which links, and what is gathered, kept and put off."""

import tomllib
from pathlib import Path

import msgspec
import pytest
from jobs import cpu_cluster

from meshwright.plan import predict
from meshwright.plan.collective import build_expert_rings, build_shard_ring, predict_exchange, ranks_along
from meshwright.plan.frame import build_frame
from meshwright.plan.passes import walk_stages
from meshwright.plan.rates import GPU
from meshwright.spec import Job, Layout
from meshwright.spec.decode import decode_job, planning_job
from meshwright.spec.hardware import cluster_of

EXAMPLES = Path(__file__).parent.parent / "examples"


def expert_job(*settings: str, gpus: str = "8xh100") -> Job:
    more = ("layout.shard=8", *settings)
    return planning_job(model="mixtral-8x7b", gpus=gpus, sequence=4096, global_batch=64, settings=more)


def test_an_exchange_of_tokens_by_hand() -> None:
    alone, divided = predict(expert_job()), predict(expert_job("layout.expert=8"))
    assert alone.step.comm_expert == 0
    # 8 microbatches, 32 blocks, two passes, there and back: two copies of 4096 tokens of 4096 numbers in bf16.
    moved_bytes = 8 * 32 * 2 * 2 * 2 * 4096 * 4096 * 2 * 7 / 8
    assert divided.step.comm_expert == pytest.approx(moved_bytes / (0.72 * 450e9), rel=0.05)
    # Experts that stay where they are need not be gathered.
    whole = [p.step.comm_shard + p.overlapped["shard"] for p in (alone, divided)]
    assert whole[1] < 0.1 * whole[0]
    assert divided.step.imbalance > 0 == alone.step.imbalance


def test_an_exchange_inside_a_node_and_out_of_it() -> None:
    cluster = cluster_of("4x8xh100")
    inside, _ = build_expert_rings(Layout(shard=32, expert=8), cluster)
    across, others = build_expert_rings(Layout(shard=32, expert=16), cluster)
    assert (inside.nodes, across.nodes, others.size) == (1, 2, 2)
    seconds = [predict_exchange(1e9, ring, cluster, GPU) for ring in (inside, across)]
    assert seconds[0] == pytest.approx(1e9 * 7 / 8 / (0.72 * 450e9), rel=0.01)
    # Half of it leaves the node, through one port.
    assert seconds[1] == pytest.approx(1e9 / 2 / (0.72 * 50e9), rel=0.01)


def test_rings_are_of_the_ranks_that_the_mesh_has() -> None:
    """Experts lie on shard x context x tensor counted in that order, however the layout orders ranks."""
    cluster = cluster_of("2x8xh100")
    layout = Layout(shard=4, tensor=4, expert=4, order=("pipeline", "replica", "tensor", "context", "shard"))
    assert list(ranks_along(layout, ("shard", "context", "tensor"))[:4]) == [0, 4, 8, 12]
    tokens, matrices = build_expert_rings(layout, cluster)
    assert (tokens.nodes, matrices.nodes) == (2, 1)
    # With replicas between them, ranks of shard and context are not side by side.
    layout = Layout(shard=2, replica=4, context=2, order=("pipeline", "shard", "replica", "context", "tensor"))
    ring = build_shard_ring(layout, cluster)
    assert (ring.size, ring.nodes) == (4, 2)
    layout = Layout(shard=2, replica=4, context=2, order=("pipeline", "replica", "context", "shard", "tensor"))
    assert build_shard_ring(layout, cluster).nodes == 1


def test_products_of_experts_are_not_put_off() -> None:
    """Later there are weights' gradients of plain matrices alone."""
    settings = ("layout.shard=1", "layout.pipeline=8", "layout.schedule=zero-bubble", "layout.zero=1")

    def weights_s(per_token: int) -> float:
        job = expert_job(*settings, f"layout.stage_layers={[2] * 16}")
        assert job.model.experts
        numbers = msgspec.structs.replace(job.model.experts, per_token=per_token)
        job = msgspec.structs.replace(job, model=msgspec.structs.replace(job.model, experts=numbers))
        return walk_stages(job, build_frame(job))[1].weights_s

    assert weights_s(1) == weights_s(4) > 0


def test_experts_are_gathered_where_the_rest_is_whole() -> None:
    """Along tensor alone nothing is sharded but experts, eight ways: their gradients do not wait whole."""
    settings = ("layout.shard=1", "layout.tensor=8")
    gathered, kept = (predict(expert_job(*settings, f"layout.zero={zero}")) for zero in (3, 1))
    # 45.1e9 parameters of experts but for two blocks, whole in bf16, and all their gradients in fp32.
    assert kept.memory.communication_buffers - gathered.memory.communication_buffers > 42e9 * 2 + 45e9 * 4
    assert gathered.memory.communication_buffers < 20e9
    # 64 microbatches: gathered twice and reduced in each, or once.
    moved = [p.step.comm_shard + p.overlapped["shard"] for p in (gathered, kept)]
    assert moved[0] == pytest.approx(64 * moved[1] * (2 * 2 + 4) / (2 + 4), rel=0.02)
    # With an expert to each rank there is nothing to gather, and nothing of it to hold beside.
    alone = predict(expert_job(*settings, "layout.expert=8"))
    assert alone.step.comm_shard + alone.overlapped.get("shard", 0.0) == 0
    assert alone.memory.parameters == gathered.memory.parameters


@pytest.mark.parametrize(("expert", "step_s", "host_s"), [(1, 0.379, 0.054), (2, 0.419, 0.117)])
def test_steps_of_a_mixture_measured_on_two_h200s(expert: int, step_s: float, host_s: float) -> None:
    """examples/mixture.toml: the step not profiled, `host` as the profiled account has it."""
    table = tomllib.loads((EXAMPLES / "mixture.toml").read_text())
    table["layout"] |= {"shard": 2, "expert": expert}
    prediction = predict(decode_job(table | {"cluster": {"gpus": "2xh200"}}, local=cpu_cluster))
    assert prediction.step_s == pytest.approx(step_s, rel=0.1)
    assert prediction.step.host == pytest.approx(host_s, rel=0.1)
    # In a pipeline's passes they count as well.
    piped = predict(expert_job("layout.shard=4", "layout.pipeline=2", f"layout.expert={expert}"))
    assert piped.step.closes(piped.step_s) and piped.step.host > 0
