"""Predicted bytes: states against hand calculation, what is whole when, and peaks measured on GPUs."""

import msgspec
import pytest

from meshwright.plan import predict_memory
from meshwright.plan.machine import cpu_cluster
from meshwright.plan.memory import CPU_PROCESS_BYTES, gathered_bytes, reduction_bytes
from meshwright.plan.part import build_part
from meshwright.spec import (
    DataSettings,
    Job,
    Layout,
    ModelSpec,
    OptimizerSettings,
    RunSettings,
    count_parameters,
    parameter_shapes,
)
from meshwright.spec.decode import planning_job

# Vocabulary and feed-forward that 4 does not divide: the last rank holds less.
ODD = ModelSpec(layers=2, d_model=8, heads=2, kv_heads=1, head_dim=4, feed_forward=6, vocabulary=13)


def cpu_job(model: ModelSpec, layout: Layout, *, global_batch: int = 8, sequence: int = 16, optimizer: str = "adamw"):
    return Job(
        run=RunSettings(name="test", steps=1),
        model=model,
        data=DataSettings(sequence=sequence, global_batch=global_batch),
        optimizer=OptimizerSettings(name="sgd" if optimizer == "sgd" else "adamw"),
        layout=layout,
        cluster=cpu_cluster(layout.world_size),
    )


def gpu_job(model: str, gpus: str, *settings: str, sequence: int = 8192, global_batch: int = 8) -> Job:
    return planning_job(model=model, gpus=gpus, sequence=sequence, global_batch=global_batch, settings=settings)


def test_states_of_one_process_by_hand() -> None:
    # Embedding and head 13 x 8 each, final norm 8; a block: norms 8 + 8, query 8 x 8, key and value 4 x 8, output
    # 8 x 8, gate and up 6 x 8, down 8 x 6.
    whole = 2 * 104 + 8 + 2 * (16 + 64 + 2 * 32 + 64 + 3 * 48)
    memory = predict_memory(cpu_job(ODD, Layout(precision="fp32")))
    assert (memory.parameters, memory.gradients) == (4 * whole, 4 * whole)
    assert memory.optimizer_states == 2 * 4 * whole + 4 * (3 + 2 * 9)


def test_the_fullest_rank_holds_ceiled_rows() -> None:
    # Over 4 ranks: 13 rows give 4, 8 give 2, 4 give 1, 6 give 2.
    block = 2 + 2 + 2 * 8 + 1 * 8 + 1 * 8 + 2 * 8 + 2 * 8 + 2 * 8 + 2 * 6
    local = 2 * 4 * 8 + 2 + 2 * block
    job = cpu_job(ODD, Layout(shard=4, precision="fp32"))
    assert build_part(job).local == local
    memory = predict_memory(job)
    assert memory.parameters == 4 * local
    assert memory.optimizer_states == 8 * local + 4 * 21


def test_the_fullest_rank_of_the_tensor_axis() -> None:
    """4 ranks share the 2 key heads of 4 numbers; 13 tokens' rows give 4, and 30 columns do not divide either."""
    model = msgspec.structs.replace(ODD, heads=4, kv_heads=2, feed_forward=28)
    block = 8 + 8 + 4 * 8 + 2 * (8 * 8) + 8 * 4 + 3 * 7 * 8
    whole = build_part(cpu_job(model, Layout(tensor=4)))
    assert whole.local == whole.groups.whole() == 2 * 4 * 8 + 8 + 2 * block
    # Split further over 3 ranks: rows of what tensor left.
    block = 3 + 3 + 2 * 8 + 2 * (3 * 8) + 3 * 4 + 2 * 3 * 8 + 3 * 7
    assert build_part(cpu_job(model, Layout(tensor=4, shard=3))).local == 2 * 2 * 8 + 3 + 2 * block


def test_biases_follow_their_matrices() -> None:
    """Of a column layer split, of a row layer whole; the table of positions is whole."""
    model = ModelSpec(
        family="gpt2",
        layers=1,
        d_model=8,
        heads=2,
        kv_heads=2,
        head_dim=4,
        feed_forward=6,
        vocabulary=13,
        max_positions=5,
        tied_embeddings=True,
    )
    part = build_part(cpu_job(model, Layout(tensor=2)))
    attention = 3 * (4 * 8 + 4) + (8 * 4 + 8)
    feed_forward = (3 * 8 + 3) + (8 * 3 + 8)
    assert part.local == 7 * 8 + 5 * 8 + 3 * 16 + attention + feed_forward
    assert (part.groups.head, part.tensors) == (0, len(parameter_shapes(model)))


def test_sgd_has_no_states() -> None:
    assert predict_memory(cpu_job(ODD, Layout(), optimizer="sgd")).optimizer_states == 0


@pytest.mark.parametrize("tied", [True, False])
def test_groups_and_tensors_are_the_whole_model(tied: bool) -> None:
    model = msgspec.structs.replace(ODD, tied_embeddings=tied)
    part = build_part(cpu_job(model, Layout()))
    assert part.groups.whole() == count_parameters(model) == part.local
    assert part.tensors == len(parameter_shapes(model))
    assert bool(part.groups.head) != tied


def test_what_each_zero_holds_whole() -> None:
    def buffers(layout: Layout) -> tuple[float, float]:
        job = cpu_job(ODD, layout)
        return gathered_bytes(job, groups), reduction_bytes(job, groups)

    groups = build_part(cpu_job(ODD, Layout())).groups
    ends, whole = groups.root + groups.head, groups.whole()
    in_flight = groups.block * (2 + 4)
    # 8 sequences over 2 ranks in microbatches of 1: four of them. A gather's own buffer is as large as a group.
    largest = max(groups.block, groups.head, groups.root)
    assert buffers(Layout(shard=2, zero=3)) == (2 * (ends + 2 * groups.block + largest), in_flight)
    assert buffers(Layout(shard=2, zero=2)) == (2 * (whole + largest), in_flight)
    assert buffers(Layout(shard=2, zero=1)) == (2 * (whole + largest), in_flight + 4 * whole)
    # A replica has no other rank to gather from, but FSDP makes and frees its compute copies all the same.
    assert buffers(Layout(replica=2)) == (2 * (ends + 2 * groups.block), in_flight + 4 * whole)
    assert buffers(Layout(replica=2, zero=2))[0] == 2 * whole
    # One microbatch: nothing is kept for a second one.
    assert buffers(Layout(replica=2, microbatch=4)) == (2 * (ends + 2 * groups.block), in_flight)


def test_the_process_itself_counts() -> None:
    assert predict_memory(cpu_job(ODD, Layout())).framework == CPU_PROCESS_BYTES


@pytest.mark.parametrize(
    ("gpus", "model", "sequence", "microbatch", "reserved_gib"),
    [
        ("4xh200", "llama3-8b", 8192, 1, 74),
        ("2xh200", "llama3-8b", 8192, 1, 104),
        ("2xh200", "llama-1b-untied", 4096, 8, 68),
        ("1xh200", "llama-1b-untied", 4096, 8, 79),
    ],
)
def test_peaks_measured_on_h200s(gpus: str, model: str, sequence: int, microbatch: int, reserved_gib: float) -> None:
    """Reserved memory of torchtitan's runs in the notes on GPU baselines: a check of the terms, not of our trainer.

    Nobody noted whether their allocator's ranges grew.
    """
    ranks = int(gpus[0])
    job = gpu_job(
        model,
        gpus,
        f"layout.shard={ranks}",
        f"layout.microbatch={microbatch}",
        sequence=sequence,
        global_batch=ranks * microbatch,
    )
    memory = predict_memory(job)
    reserved = memory.total() - memory.framework
    assert reserved / 2**30 == pytest.approx(reserved_gib, rel=0.15)


@pytest.mark.parametrize(
    ("microbatch", "recompute", "kept", "measured_gb"),
    [
        (1, "none", 16, 40.6),
        (2, "none", 16, 48.5),
        (4, "none", 16, 63.6),
        (8, "none", 16, 92.5),
        (8, "selective", 0, 77.6),
        (8, "8", 8, 72.9),
        (8, "full", 0, 56.1),
        (16, "selective", 0, 114.9),
        (16, "full", 0, 69.4),
    ],
)
def test_what_our_own_runs_held_on_one_h200(microbatch: int, recompute: str, kept: int, measured_gb: float) -> None:
    """Reserved, with the device context (benchmarks/training_gpu.py --table one-gpu, 2026-11-23, ranges that grow).

    Those runs kept attention's output twice in each of `kept` blocks, 2048 numbers a token, and do not any more.
    """
    settings = (f"layout.microbatch={microbatch}", f"layout.recompute={recompute}")
    job = gpu_job("llama-1b-untied", "1xh200", *settings, sequence=4096, global_batch=16)
    twice = 2 * 2048 * kept * microbatch * 4096
    assert predict_memory(job).total() == pytest.approx(measured_gb * 1e9 - twice, rel=0.03)


def test_memory_that_lies_in_holes() -> None:
    """Where all blocks keep their inputs alone there is room for one of them, unless the logits fit in there."""

    def fragmentation(*settings: str, gpus: str = "1xh200") -> float:
        job = gpu_job("llama-1b-untied", gpus, *settings, sequence=4096, global_batch=4)
        return predict_memory(job).fragmentation

    one_block = 80e3 * 4 * 4096
    assert fragmentation("layout.microbatch=4", "layout.recompute=full") == pytest.approx(one_block, rel=0.1)
    assert fragmentation("layout.microbatch=4") < one_block / 2
    few_words = ("layout.microbatch=4", "layout.recompute=full", "model.vocabulary=1000")
    assert fragmentation(*few_words) < one_block / 20
    # Backward passes that are cut in two recompute nothing here, and keep more than their inputs.
    cut = ("layout.pipeline=2", "layout.microbatch=1", "layout.zero=1")
    for schedule in ("1f1b", "zero-bubble", "zbv", "dualpipev"):
        assert fragmentation(*cut, f"layout.schedule={schedule}", gpus="2xh200") < one_block / 4
    # Of a rank's two stages one keeps all, and so fills the other's room.
    half = ("layout.pipeline=2", "layout.microbatch=2", "layout.zero=1", "layout.schedule=interleaved")
    assert fragmentation(*half, "layout.recompute=8", gpus="2xh200") < one_block / 4
    assert fragmentation(*half, "layout.recompute=full", gpus="2xh200") == pytest.approx(one_block / 2, rel=0.1)
    # Of another program nobody knows that its allocator's ranges grow.
    assert fragmentation("layout.microbatch=4", "trainer.name=torchtitan") > 4 * fragmentation("layout.microbatch=4")
