"""Memory of programs with kernels of their own, by the traits that tell them apart: against formulas from papers."""

from typing import Any

import msgspec
import pytest

from meshwright.plan import predict, predict_memory
from meshwright.plan.activations import activation_bytes, logits_bytes
from meshwright.plan.compute import attention_seconds, head_passes
from meshwright.plan.held import whole_bytes
from meshwright.plan.kept import keep_block
from meshwright.plan.kernels import keep_kernels, passing_bytes
from meshwright.plan.memory import NCCL_BYTES, boundary_bytes, framework_bytes, update_bytes
from meshwright.plan.part import Part, build_parts, cut_model
from meshwright.spec import (
    TRAINERS,
    DataSettings,
    Experts,
    Job,
    Layout,
    ModelSpec,
    RunSettings,
    check_job,
    count_parameters,
)
from meshwright.spec.decode import planning_job
from meshwright.spec.hardware import cluster_of

# Width, heads, sequence, microbatch: h, a, s, b of arXiv:2205.05198.
WIDE, HEADS, LONG, FEW = 1024, 16, 512, 4
GPT = ModelSpec(
    family="gpt2",
    layers=4,
    d_model=WIDE,
    heads=HEADS,
    kv_heads=HEADS,
    head_dim=WIDE // HEADS,
    feed_forward=4 * WIDE,
    vocabulary=8192,
    max_positions=LONG,
    tied_embeddings=True,
)
ALONE = Layout(microbatch=FEW)
# Beside the paper's terms: mean and root of two norms in fp32.
NORMS = 2 * 2 * 4


def gpt_job(trainer: str, layout: Layout = ALONE, **traits: Any) -> Job:
    """A GPT in bf16 in another program's hands. traits: what is different about it."""
    return Job(
        run=RunSettings(name="test", steps=1),
        model=GPT,
        data=DataSettings(sequence=LONG, global_batch=8 * FEW),
        layout=layout,
        cluster=cluster_of(f"{layout.world_size}xa100-80"),
        trainer=msgspec.structs.replace(TRAINERS[trainer], **traits),
    )


def with_traits(job: Job, **traits: Any) -> Job:
    """The same job where the program differs."""
    return msgspec.structs.replace(job, trainer=msgspec.structs.replace(job.trainer, **traits))


def kept(job: Job, *, selective: bool = False) -> float:
    return keep_kernels(job, cut_model(job), dense=False, selective=selective)


def only_part(job: Job) -> Part:
    return build_parts(job)[-1]


def test_a_block_keeps_what_was_published() -> None:
    """34 sbh + 5 as^2b without parallelism (arXiv:2205.05198, equation 1)."""
    tokens = LONG * FEW
    assert kept(gpt_job("megatron-lm")) == tokens * (34 * WIDE + 5 * HEADS * LONG + NORMS)
    # Attention's scores computed again leave 34 sbh (equation 5, table 2).
    assert kept(gpt_job("megatron-lm"), selective=True) == tokens * (34 * WIDE + NORMS)


@pytest.mark.parametrize("ranks", [2, 8])
def test_along_tensor_norms_are_whole_unless_the_sequence_is_split(ranks: int) -> None:
    """sbh (10 + 24/t + 5as/ht), and with sequence parallelism all of it by t (equations 2 and 4)."""
    tokens, scores = LONG * FEW, 5 * HEADS * LONG
    whole = gpt_job("megatron-lm", Layout(microbatch=FEW, tensor=ranks))
    assert kept(whole) == tokens * (10 * WIDE + (24 * WIDE + scores) / ranks + NORMS)
    split = with_traits(whole, sequence_parallel=True)
    assert kept(split) == tokens * (34 * WIDE + scores + NORMS) / ranks
    # Inputs of two products that are not gathered again are kept whole.
    gathered = with_traits(split, regathers=False)
    assert kept(gathered) - kept(split) == tokens * 2 * 2 * WIDE * (1 - 1 / ranks)


def test_what_kernels_keep_of_scores_and_norms() -> None:
    tokens, scores = LONG * FEW, LONG * FEW * HEADS * LONG
    fused = gpt_job("megatron-lm", dropout=False)
    # Softmax in bf16, in fp32 beside it, or a number a row.
    plain = gpt_job("megatron-lm", dropout=False, attention="plain")
    flash = gpt_job("megatron-lm", dropout=False, attention="flash")
    assert kept(plain) - kept(fused) == 4 * scores
    assert kept(fused) - kept(flash) == 2 * scores - tokens * HEADS * 4
    assert passing_bytes(plain, cut_model(plain)) > passing_bytes(flash, cut_model(flash))
    # Each of two norms keeps its input in fp32 and the scaled one.
    assert kept(gpt_job("megatron-lm", dropout=False, fused_norms=False)) - kept(fused) == tokens * 2 * 6 * WIDE


@pytest.mark.parametrize("ranks", [1, 4])
def test_whole_weights_beside_divided_states(ranks: int) -> None:
    """2 bytes and 2 of gradients whole, and 12 that ranks divide (arXiv:1910.02054, figure 1, for ZeRO-1)."""
    job = gpt_job("megatron-deepspeed", Layout(microbatch=FEW, shard=ranks, zero=1))
    parameters = count_parameters(job.model)
    states = whole_bytes(job, only_part(job).groups)
    assert (states.parameters, states.gradients) == (2 * parameters, 2 * parameters)
    assert states.optimizer_states == 12 * parameters / ranks
    held = with_traits(job, splits_states=False)
    assert whole_bytes(held, only_part(held).groups).optimizer_states == 12 * parameters
    # Megatron-Core adds gradients up in fp32.
    core = msgspec.structs.replace(job, trainer=TRAINERS["megatron-core"])
    assert whole_bytes(core, only_part(core).groups).gradients == 4 * parameters


def test_experts_are_divided_over_the_ranks_that_share_them() -> None:
    experts = Experts(count=8, per_token=2, feed_forward=WIDE)
    job = gpt_job("megatron-core", Layout(microbatch=FEW, shard=4, zero=1, expert=2))
    mixture = msgspec.structs.replace(
        job,
        model=msgspec.structs.replace(job.model, family="gpt2-moe", experts=experts),
    )
    check_job(mixture)
    routed = 4 * 2 * 8 * WIDE * WIDE
    plain = count_parameters(mixture.model) - routed
    states = whole_bytes(mixture, only_part(mixture).groups)
    assert states.parameters == 2 * (plain + routed / 2)
    # Two ranks of four have the same experts.
    assert states.optimizer_states == 12 * (plain / 4 + routed / 2 / 2)


def test_logits_by_the_loss() -> None:
    layout = Layout(microbatch=FEW, tensor=2)
    logits = LONG * FEW * 8192
    assert logits_bytes(gpt_job("megatron-lm", layout)) == 6 * logits / 2
    # Gathered, each rank has all of them, as sent and as they came.
    whole = gpt_job("megatron-lm", layout, whole_logits=True, loss="plain")
    assert logits_bytes(whole) == (12 + 2 * 2) * logits
    assert logits_bytes(gpt_job("megatron-lm", whole_logits=True, loss="plain")) == (12 + 2) * logits


def test_the_fullest_moment_may_be_the_optimizers() -> None:
    job = gpt_job("megatron-deepspeed", Layout(recompute="full"))
    parameters = count_parameters(job.model)
    memory = predict_memory(job)
    assert update_bytes(job, only_part(job).groups) == 6 * parameters
    assert (memory.activations, memory.gradients) == (0, 2 * parameters)
    assert memory.communication_buffers == 6 * parameters
    # In fp32 already, gradients are not copied.
    core = msgspec.structs.replace(job, trainer=TRAINERS["megatron-core"])
    assert update_bytes(core, only_part(core).groups) == 0
    assert predict_memory(core).activations > 0


def test_what_a_pipeline_holds_of_what_it_sent() -> None:
    job = gpt_job("megatron-lm", Layout(microbatch=FEW, pipeline=2, stage_layers=(2, 2)))
    state = LONG * FEW * WIDE * 2
    assert boundary_bytes(job, only_part(job)) == 2 * state
    assert boundary_bytes(gpt_job("megatron-lm"), only_part(gpt_job("megatron-lm"))) == 0
    keeps = with_traits(job, keeps_sent=True)
    # Two microbatches are between their passes on the first rank.
    assert predict_memory(keeps).activations - predict_memory(job).activations == 2 * state


def test_a_communicator_for_each_axis() -> None:
    one = gpt_job("megatron-lm")
    three = gpt_job("megatron-lm", Layout(tensor=2, pipeline=2, replica=2))
    assert framework_bytes(three) - framework_bytes(one) == 3 * NCCL_BYTES


def test_each_second_product() -> None:
    """torchtitan saves products of odd number: queries, values, gate (and, uncompiled, down); all of attention."""
    job = planning_job(model="llama3-8b", gpus="8xh100", sequence=1024, global_batch=8, settings=["layout.shard=8"])
    half = msgspec.structs.replace(job, trainer=TRAINERS["torchtitan"])
    cut, model = cut_model(half), half.model
    elements = model.d_model + 2 * model.heads * model.head_dim + model.kv_heads * model.head_dim + model.feed_forward
    found = keep_block(half, cut, dense=False, selective=True)
    assert found == 1024 * (2 * elements + 4 * model.heads)
    assert found < keep_block(job, cut, dense=False, selective=True)
    eager = with_traits(half, compiled=False)
    assert keep_block(eager, cut, dense=False, selective=True) - found == 1024 * 2 * model.d_model


def test_selective_means_what_the_trainer_says() -> None:
    """One policy of three, whoever else's kernels the blocks have."""
    layout = Layout(microbatch=FEW, recompute="selective")
    jobs = [gpt_job("megatron-lm", layout, selective=each) for each in ("half-products", "products", "all-but-scores")]
    half, products, scores, nothing = (activation_bytes(job, only_part(job)) for job in (*jobs, gpt_job("megatron-lm")))
    assert half < products < scores < nothing


def test_heads_of_an_odd_size_keep_scores_off_the_matrix_units() -> None:
    """Rows of 16 bytes are what these read. A kernel that fills heads up does not mind."""

    def attention_s(trainer: str, head_dim: int) -> float:
        job = gpt_job(trainer)
        model = msgspec.structs.replace(GPT, head_dim=head_dim, d_model=HEADS * head_dim)
        job = msgspec.structs.replace(job, model=model)
        return sum(attention_seconds(job, cut_model(job)))

    assert attention_s("megatron-lm", 108) > 2 * attention_s("megatron-lm", 112)
    assert attention_s("megatron-core", 108) < attention_s("megatron-core", 112)


def test_a_loss_passes_over_its_logits_as_often_as_its_kernels_do() -> None:
    tensor = msgspec.structs.replace(ALONE, tensor=2)

    def loss_s(**traits: Any) -> float:
        passes = head_passes(gpt_job("megatron-core", tensor, **traits))
        return passes.forward_s + passes.backward_s - 3 * passes.weights_s

    # 8 bytes a logit; 36 and 48 beside 4.
    assert loss_s(loss="plain") == pytest.approx(40 / 8 * loss_s(loss="compiled"))
    assert loss_s(loss="in-place") == pytest.approx(52 / 8 * loss_s(loss="compiled"))
    assert loss_s(whole_logits=True) == pytest.approx(2 * loss_s(), rel=0.01)


# Blocks, width, heads, batch, pipeline; GPUs and microbatch of ZeRO-3 (arXiv:2104.04473, table 2).
CROSSINGS = [
    (96, 12288, 96, 1536, 12, 384, 4),
    (96, 12288, 96, 1536, 12, 768, 2),
    (96, 12288, 96, 1536, 12, 1536, 1),
    (105, 20480, 128, 2240, 35, 1120, 2),
    (105, 20480, 128, 2240, 35, 2240, 1),
]


@pytest.mark.parametrize(("layers", "width", "heads", "batch", "stages", "gpus", "microbatch"), CROSSINGS)
def test_pipelines_beat_zero_3_where_they_were_found_to(
    layers: int, width: int, heads: int, batch: int, stages: int, gpus: int, microbatch: int
) -> None:
    """More and more, the fewer sequences there are for each GPU."""
    sizes = {"layers": layers, "d_model": width, "heads": heads, "kv_heads": heads, "head_dim": width // heads}
    model = msgspec.structs.replace(GPT, **sizes, feed_forward=4 * width, vocabulary=51200, max_positions=2048)
    divided = Layout(shard=gpus, zero=3, microbatch=microbatch, recompute="full")
    piped = Layout(pipeline=stages, tensor=8, shard=gpus // (8 * stages), zero=1, recompute="full", microbatch=1)
    seconds = [
        predict(
            Job(
                run=RunSettings(name="test", steps=1),
                model=model,
                data=DataSettings(sequence=2048, global_batch=batch),
                layout=layout,
                cluster=cluster_of(f"{gpus // 8}x8xa100-80"),
                trainer=TRAINERS[trainer],
            )
        ).step_s
        for trainer, layout in (("deepspeed-zero3", divided), ("megatron-lm", piped))
    ]
    assert seconds[0] > seconds[1] * (1 if microbatch == 4 else 1.5 if microbatch == 2 else 2.5)
