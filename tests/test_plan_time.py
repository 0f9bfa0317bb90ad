"""Predicted seconds: transfers by formula, overlap by walking, whole steps against the measured ones."""

import random
from typing import Literal

import msgspec
import pytest

from meshwright.plan import predict
from meshwright.plan.collective import Ring, build_ring, predict_collective
from meshwright.plan.machine import cpu_cluster
from meshwright.plan.rates import CPU, GPU
from meshwright.plan.walk import walk_backward, walk_forward
from meshwright.plan.work import Copies, Moves, Piece
from meshwright.record import Prediction
from meshwright.spec import DataSettings, Job, Layout, ModelSpec, Recompute, RunSettings
from meshwright.spec.decode import planning_job
from meshwright.spec.hardware import cluster_of


def job_on(gpus: str, model: str, sequence: int, global_batch: int, *settings: str) -> Job:
    return planning_job(model=model, gpus=gpus, sequence=sequence, global_batch=global_batch, settings=settings)


@pytest.mark.parametrize(
    ("gpus", "model", "sequence", "microbatch", "tokens_per_s"),
    [
        # notes on GPU baselines: tokens a second and GPU of the fastest plain runs, and the step that GPU rates are of.
        ("2xh200", "llama3-8b", 8192, 1, 9576),
        ("2xh200", "llama3-8b", 8192, 1, 9520),
        ("4xh200", "llama3-8b", 8192, 1, 9838),
        ("1xh200", "llama-1b-untied", 4096, 8, 62085),
        ("2xh200", "llama-1b-untied", 4096, 8, 59622),
    ],
)
def test_steps_measured_on_h200s(gpus: str, model: str, sequence: int, microbatch: int, tokens_per_s: float) -> None:
    ranks = int(gpus[0])
    settings = (f"layout.shard={ranks}", f"layout.microbatch={microbatch}")
    prediction = predict(job_on(gpus, model, sequence, ranks * microbatch, *settings))
    assert prediction.tokens_per_s / ranks == pytest.approx(tokens_per_s, rel=0.15)


def test_little_transfer_is_exposed_on_nvlink() -> None:
    """8 ms of NCCL's 187 ms were, in the measured 855 ms step."""
    prediction = predict(job_on("2xh200", "llama3-8b", 8192, 2, "layout.shard=2"))
    assert 0.002 < prediction.step.comm_shard < 0.03
    assert prediction.overlapped["shard"] > 5 * prediction.step.comm_shard


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize(("replica", "shard"), [(1, 1), (4, 1), (1, 4), (2, 2)])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_account_closes(kind: str, replica: int, shard: int, zero: Literal[1, 2, 3]) -> None:
    cluster = cpu_cluster(4) if kind == "cpu" else cluster_of("2x2xh100")
    layout = Layout(replica=replica, shard=shard, zero=zero)
    small = ModelSpec(layers=3, d_model=64, heads=4, kv_heads=2, head_dim=16, feed_forward=96, vocabulary=257)
    job = Job(
        run=RunSettings(name="test", steps=1),
        model=small,
        data=DataSettings(sequence=64, global_batch=16),
        layout=layout,
        cluster=cluster,
    )
    prediction = predict(job)
    assert prediction.step.closes(prediction.step_s)
    assert prediction.tokens_per_s == pytest.approx(16 * 64 / prediction.step_s)
    assert bool(prediction.step.comm_shard) == (shard > 1)
    assert bool(prediction.step.comm_replica) == (replica > 1)
    assert (kind == "cpu") <= (not any(prediction.overlapped.values()))


@pytest.mark.parametrize("recompute", ["none", "selective", 1, "full"])
@pytest.mark.parametrize(("replica", "shard", "tensor"), [(1, 1, 4), (2, 1, 2), (1, 2, 2), (1, 4, 1)])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_and_with_tensor_and_recompute(
    kind: str, replica: int, shard: int, tensor: int, recompute: Recompute | int
) -> None:
    cluster = cpu_cluster(4) if kind == "cpu" else cluster_of("2x2xh100")
    job = Job(
        run=RunSettings(name="test", steps=1),
        model=ModelSpec(layers=3, d_model=64, heads=4, kv_heads=2, head_dim=16, feed_forward=96, vocabulary=257),
        data=DataSettings(sequence=64, global_batch=16),
        layout=Layout(replica=replica, shard=shard, tensor=tensor, recompute=recompute),
        cluster=cluster,
    )
    prediction = predict(job)
    assert prediction.step.closes(prediction.step_s)
    assert bool(prediction.step.comm_tensor) == (tensor > 1)
    # Compiled, selective recompute is part of the backward pass's kernels.
    again = recompute != "none" and not (recompute == "selective" and kind == "cuda")
    assert bool(prediction.step.recompute) == again


def with_settings(*settings: str) -> Prediction:
    """Four microbatches a step of 8B on 8 GPUs."""
    return predict(job_on("8xh200", "llama3-8b", 8192, 32, *settings))


def test_a_step_divided_along_tensor_is_as_useful() -> None:
    sharded, split = with_settings("layout.shard=8"), with_settings("layout.shard=4", "layout.tensor=2")
    assert split.step.useful == sharded.step.useful
    # As many FLOPs a rank in smaller products.
    assert 1 < split.step.compute / sharded.step.compute < 1.1


def test_transfers_along_tensor_by_hand() -> None:
    split = with_settings("layout.shard=1", "layout.tensor=8", "layout.microbatch=4")
    # Eight microbatches; in each, 32 blocks gather and reduce [4, 8192, 4096] in bf16 four times a pass, embedding and
    # head twice. A ring of 8 moves 7/8 of it, at 72% or 71% of NVLink's 450 GB/s.
    moved_bytes = 8 * (32 * 8 + 4) * 7 / 8 * 4 * 8192 * 4096 * 2
    # On top come small sums: of the loss, of the gradients of norms.
    assert 1 < split.step.comm_tensor / (moved_bytes / (0.715 * 450e9)) < 1.1


def test_async_tensor_hides_transfers_under_the_products_beside_them() -> None:
    plain = with_settings("layout.shard=4", "layout.tensor=2")
    hiding = with_settings("layout.shard=4", "layout.tensor=2", "layout.async_tensor=true")
    # As much of them as published steps of torchtitan say.
    assert 0.55 < hiding.step.comm_tensor / plain.step.comm_tensor < 0.6
    whole = hiding.step.comm_tensor + hiding.overlapped["tensor"]
    assert whole == pytest.approx(plain.step.comm_tensor)
    assert "tensor" not in plain.overlapped


def test_recompute_costs_a_forward_pass_of_its_blocks() -> None:
    steps = {n: with_settings("layout.shard=8", f"layout.recompute={n}").step for n in (0, 8, 16)}
    full = with_settings("layout.shard=8", 'layout.recompute="full"').step
    assert steps[0].recompute == 0
    assert steps[16].recompute == pytest.approx(2 * steps[8].recompute)
    assert full.recompute == pytest.approx(4 * steps[8].recompute)
    # A forward pass is a third of compute, less the head's part and the copies'.
    assert 0.25 < full.recompute / full.compute < 0.33
    split = with_settings("layout.shard=4", "layout.tensor=2").step
    again = with_settings("layout.shard=4", "layout.tensor=2", 'layout.recompute="full"').step
    assert again.comm_tensor / split.comm_tensor == pytest.approx(1.5, rel=0.02)


def test_selective_recompute_is_cheap() -> None:
    plain, selective = (with_settings("layout.shard=8", f'layout.recompute="{n}"') for n in ("none", "selective"))
    assert 1 < selective.step_s / plain.step_s < 1.05
    assert selective.memory.activations < 0.8 * plain.memory.activations


@pytest.mark.parametrize(
    ("settings", "global_batch", "tokens_per_s"),
    [
        # notes on GPU baselines, tokens a second and GPU: our model of blocks, with half of them recomputed, and 4 GPUs
        # of which 2 share each sequence (there every second product is recomputed as well, which we do not offer).
        (("layout.shard=4", "layout.microbatch=2", "layout.recompute=16"), 8, 9251),
        (("layout.shard=2", "layout.tensor=2", "layout.microbatch=4", "layout.recompute=selective"), 8, 8631),
        (("layout.shard=2", "layout.microbatch=2", "layout.recompute=selective"), 4, 9982),
    ],
)
def test_steps_measured_with_recompute(settings: tuple[str, ...], global_batch: int, tokens_per_s: float) -> None:
    ranks = 2 if global_batch == 4 else 4
    prediction = predict(job_on(f"{ranks}xh200", "llama3-8b", 8192, global_batch, *settings))
    assert prediction.tokens_per_s / ranks == pytest.approx(tokens_per_s, rel=0.15)


def test_useful_is_model_flops_at_the_peak() -> None:
    prediction = predict(job_on("8xh100", "llama3-8b", 8192, 8, "layout.shard=8"))
    # 57.9 GFLOP a token, as torchtitan counts (notes on GPU baselines).
    assert prediction.step.useful == pytest.approx(8192 * 57.9e9 / 989.4e12, rel=0.01)


def test_an_unknown_peak_gives_no_time() -> None:
    job = job_on("8xh100", "llama3-8b", 8192, 8, "layout.shard=8")
    silent = predict(job_with_peak(job, 0.0))
    assert (silent.step_s, silent.tokens_per_s, silent.step.total()) == (0, 0, 0)
    assert silent.memory == predict(job).memory
    assert "not known" in silent.notes[0]


def job_with_peak(job: Job, peak: float) -> Job:
    device = msgspec.structs.replace(job.cluster.device, peak_bf16_flops_per_s=peak)
    return msgspec.structs.replace(job, cluster=msgspec.structs.replace(job.cluster, device=device))


def test_a_ring_by_hand() -> None:
    ring = Ring(size=4, nodes=1, link_bytes_per_s=100e9, round_s=5e-6)
    # An all-reduce passes 2 x 3 parts of a quarter, at 78% of the link.
    assert predict_collective("all_reduce", 4e9, ring, GPU) == pytest.approx(6e9 / 78e9 + 6 * 5e-6)
    assert predict_collective("all_gather", 4e9, ring, GPU) == pytest.approx(3e9 / 72e9 + 3 * 5e-6)
    assert predict_collective("reduce_scatter", 4e9, ring, CPU) == pytest.approx(3e9 / 50e9 + 3 * 5e-6)
    alone = Ring(size=1, nodes=1, link_bytes_per_s=100e9, round_s=5e-6)
    assert predict_collective("all_reduce", 4e9, alone, GPU) == 0


def test_bus_bandwidth_measured_on_4_h200s() -> None:
    ring = build_ring(Layout(shard=4), "shard", cluster_of("4xh200"))
    for size_bytes, bus_bytes_per_s in ((2**30, 353e9), (2**24, 253e9), (2**20, 36e9)):
        seconds = predict_collective("all_reduce", size_bytes, ring, GPU)
        assert 1.5 * size_bytes / seconds == pytest.approx(bus_bytes_per_s, rel=0.1)


def test_axes_lie_on_the_links_that_the_order_gives_them() -> None:
    cluster = cluster_of("4x8xh100")
    layout = Layout(replica=4, shard=8)
    inside, across = build_ring(layout, "shard", cluster), build_ring(layout, "replica", cluster)
    assert (inside.nodes, inside.link_bytes_per_s) == (1, cluster.intra.bytes_per_s)
    # One member a node, one port each.
    assert (across.nodes, across.link_bytes_per_s) == (4, cluster.inter.bytes_per_s)
    turned = Layout(replica=4, shard=8, order=("pipeline", "shard", "replica", "context", "tensor"))
    assert build_ring(turned, "replica", cluster).nodes == 1
    # Two of the eight shards a node now: they share the border's two ports.
    shard = build_ring(turned, "shard", cluster)
    assert (shard.nodes, shard.link_bytes_per_s) == (4, 2 * cluster.inter.bytes_per_s)
    # All of a node in one group: eight ports, still slower than NVLink.
    whole = build_ring(Layout(shard=32), "shard", cluster)
    assert (whole.nodes, whole.link_bytes_per_s) == (4, 8 * cluster.inter.bytes_per_s)


def pieces(gather_s: float, reduce_s: float, accumulate_s: float = 0.0) -> list[Piece]:
    def piece(forward_s: float) -> Piece:
        return Piece(
            forward_s=forward_s,
            backward_s=2 * forward_s,
            copies=Copies(accumulate_s=accumulate_s, gather_s=gather_s, scatter_s=reduce_s),
        )

    return [piece(0), piece(10), piece(10), piece(10), piece(4)]


def test_only_the_first_gather_shows_when_compute_is_long() -> None:
    walk = walk_forward(pieces(1, 1), overlaps=True)
    # The root computes nothing, so the first block's gather shows as well.
    assert (walk.compute_s, walk.shard_s, walk.exposed_shard_s) == (34, 5, 2)


def test_long_gathers_show_where_compute_is_too_short() -> None:
    walk = walk_forward(pieces(15, 1), overlaps=True)
    # Root, first block, then 5 more than a block's 10 three times.
    assert walk.exposed_shard_s == 15 + 15 + 3 * 5


def test_only_the_last_reduction_shows_when_compute_is_long() -> None:
    walk = walk_backward(pieces(0, 1), overlaps=True)
    # The root has nothing to compute: it waits for the first block's reduction, then its own shows.
    assert (walk.compute_s, walk.shard_s, walk.exposed_shard_s) == (68, 5, 2)


def test_kept_gradients_cost_a_pass() -> None:
    walk = walk_backward(pieces(0, 0, accumulate_s=0.5), overlaps=True)
    assert (walk.compute_s, walk.shard_s, walk.exposed_shard_s) == (68 + 5 * 0.5, 0, 0)


@pytest.mark.parametrize("overlaps", [True, False])
def test_alike_pieces_are_walked_as_one(overlaps: bool) -> None:
    """Whatever is longer: compute, gathers or reductions."""
    chance = random.Random(20261122)
    for _ in range(200):
        root, block, other, head = (
            Piece(
                forward_s=chance.uniform(0, 10),
                backward_s=chance.uniform(0, 20),
                again_s=chance.choice((0.0, 5.0)),
                forward=Moves(tensor_s=chance.choice((0.0, 2.0))),
                backward=Moves(tensor_s=chance.choice((0.0, 2.0)), expert_s=chance.choice((0.0, 1.0))),
                copies=Copies(
                    copy_out_s=chance.uniform(0, 1),
                    copy_in_s=chance.uniform(0, 1),
                    accumulate_s=0.5,
                    gather_s=chance.choice((0.0, 1.0, 15.0)) * chance.uniform(0.5, 1),
                    scatter_s=chance.choice((0.0, 1.0, 30.0)) * chance.uniform(0.5, 1),
                    all_reduce_s=chance.uniform(0, 2),
                ),
            )
            for _ in range(4)
        )
        one_by_one = [root, *[block] * 7, *[other] * 30, head]
        counted = [
            root,
            msgspec.structs.replace(block, count=7),
            msgspec.structs.replace(other, count=30),
            head,
        ]
        forward = [walk_forward(order, overlaps=overlaps) for order in (one_by_one, counted)]
        backward = [walk_backward(order, overlaps=overlaps) for order in (one_by_one, counted)]
        for alone, together in (forward, backward):
            assert msgspec.structs.astuple(together) == pytest.approx(msgspec.structs.astuple(alone))


def test_blocking_transfers_all_show() -> None:
    walk = walk_backward(pieces(2, 3), overlaps=False)
    # The head is whole already, the other four are gathered again.
    assert walk.exposed_shard_s == walk.shard_s == 4 * 2 + 5 * 3


def test_zero_1_moves_least_and_zero_3_most() -> None:
    """Four microbatches: zero 1 gathers and reduces once, zero 2 in each, zero 3 gathers twice in each."""

    def moved(zero: int) -> float:
        prediction = predict(job_on("2xh200", "llama-1b-untied", 4096, 8, "layout.shard=2", f"layout.zero={zero}"))
        return prediction.step.comm_shard + prediction.overlapped["shard"]

    assert moved(2) / moved(1) == pytest.approx(4, rel=0.01)
    assert moved(1) < moved(2) < moved(3) < 8 * moved(1)


@pytest.mark.parametrize(("offload", "step_s"), [("optimizer", 0.726), ("parameters", 3.18)])
def test_steps_with_offloading_measured_on_two_h200s(offload: str, step_s: float) -> None:
    settings = ("layout.shard=2", "layout.microbatch=8", f"layout.offload={offload}")
    prediction = predict(job_on("2xh200", "llama-1b-untied", 4096, 16, *settings))
    assert prediction.step_s == pytest.approx(step_s, rel=0.1)
    assert prediction.step.closes(prediction.step_s)
