"""Predictions along context: what a ring and an exchange take, hold and hide, by hand and as measured."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from ranks import run_ranks
from torch.profiler import profile

from meshwright.parallel import build_mesh, start_distributed
from meshwright.parallel.exchange import exchange
from meshwright.parallel.pairs import LARGEST_TILE
from meshwright.parallel.ring import ring_attention, ring_attention_backward
from meshwright.plan import build_plan, predict
from meshwright.plan import ring as planned
from meshwright.plan.context import context_buffer_bytes
from meshwright.plan.machine import cpu_cluster
from meshwright.plan.part import cut_model
from meshwright.spec import DataSettings, Job, Layout, ModelSpec, RunSettings
from meshwright.spec.decode import planning_job


def job_on(gpus: str, model: str, sequence: int, global_batch: int, *settings: str) -> Job:
    return planning_job(model=model, gpus=gpus, sequence=sequence, global_batch=global_batch, settings=settings)


def long_job(*settings: str, gpus: str = "8xh100") -> Job:
    more = ("model.max_positions=131072", "layout.shard=1", 'layout.recompute="full"')
    return job_on(gpus, "llama3-8b", 131072, 8, *more, *settings)


def test_ranks_of_a_context_have_equal_parts() -> None:
    forms = ("layout.shard=8",), ("layout.context=8", "layout.context_form=all-to-all")
    whole, divided = (predict(long_job(*more)) for more in forms)
    assert divided.step.useful == whole.step.useful
    assert divided.step.compute == pytest.approx(whole.step.compute, rel=0.05)
    assert divided.memory.activations == pytest.approx(whole.memory.activations / 8, rel=0.05)


def test_a_ring_hides_under_attention_inside_a_node_and_not_across() -> None:
    inside, across = predict(long_job("layout.context=8")), predict(long_job("layout.context=32", gpus="4x8xh100"))
    assert inside.step.comm_context < 0.01 * inside.step_s
    assert inside.overlapped["context"] > 5 * inside.step.comm_context
    hidden = across.overlapped["context"] / (across.overlapped["context"] + across.step.comm_context)
    assert hidden < inside.overlapped["context"] / (inside.overlapped["context"] + inside.step.comm_context)


def test_an_exchange_of_heads_by_hand() -> None:
    job = long_job("layout.context=8", "layout.context_form=all-to-all", "layout.recompute=none")
    # 8 sequences, 32 blocks, two passes; queries, keys, values and the output: 32 + 8 + 8 + 32 heads of 128 for 16,384
    # tokens in bf16, seven eighths of which leave, at 72% of NVLink's 450 GB/s.
    moved_bytes = 8 * 32 * 2 * 80 * 128 * 16384 * 2 * 7 / 8
    assert predict(job).step.comm_context == pytest.approx(moved_bytes / (0.72 * 450e9), rel=0.05)
    # Fewer key heads than ranks are repeated; so are more that the ranks do not divide.
    model = msgspec.structs.replace(job.model, kv_heads=4)
    assert predict(msgspec.structs.replace(job, model=model)).step.comm_context == predict(job).step.comm_context
    model, more = (msgspec.structs.replace(job.model, heads=48, kv_heads=heads) for heads in (12, 24))
    seconds = [predict(msgspec.structs.replace(job, model=each)).step.comm_context for each in (model, more)]
    assert seconds[0] == seconds[1]


@pytest.mark.parametrize("form", ["ring", "all-to-all"])
def test_steps_measured_on_two_h200s(form: str) -> None:
    """docs/predicting.md: about 612 ms of either form."""
    settings = ("layout.shard=1", "layout.context=2", "layout.microbatch=8", f"layout.context_form={form}")
    prediction = predict(job_on("2xh200", "llama-1b-untied", 4096, 16, *settings))
    assert prediction.step_s == pytest.approx(0.612, rel=0.15)


def test_documents_and_windows_are_not_for_rings() -> None:
    """They are computed plainly there, and as fast as ever where whole sequences are exchanged."""
    settings = ("model.max_positions=131072", "data.attention=document", "data.global_batch=4")
    plan = build_plan(job_on("2x8xh100", "llama3-8b", 131072, 4, *settings))
    divided = [p.layout.context_form for p in plan.ranked if p.layout.context > 1]
    assert divided and divided[0] == "all-to-all"
    plain, masked = (predict(long_job("layout.context=8", *more)) for more in ((), ("data.attention=document",)))
    assert masked.step.inefficiency > 5 * plain.step.inefficiency
    # Scores of one tile, four times in fp32.
    assert masked.memory.communication_buffers - plain.memory.communication_buffers > 0.9e9
    assert planned.LARGEST_TILE == LARGEST_TILE


# --- Buffers ---------------------------------------------------------------------------------------------------------


def small_job(folder: Path, form: str, kv_heads: int) -> Job:
    layout = Layout(context=2, microbatch=2, precision="fp32", context_form="ring" if form == "ring" else "all-to-all")
    model = ModelSpec(layers=1, d_model=64, heads=4, kv_heads=kv_heads, head_dim=16, feed_forward=96, vocabulary=100)
    return Job(
        run=RunSettings(name="test", steps=1, folder=str(folder)),
        model=model,
        data=DataSettings(sequence=256, global_batch=2, attention="document"),
        layout=layout,
        cluster=cpu_cluster(2),
    )


def taken_bytes(folder: Path, job: Job) -> int:
    """What attention's backward pass has at most beside its inputs, as the profiler sees memory come and go."""
    device, model = start_distributed(job.cluster), job.model
    group = build_mesh(job.layout, device)["context"].get_group().group_name
    tokens = job.data.sequence // 2
    query = torch.randn(2, model.heads, tokens, model.head_dim)
    key, value = torch.randn(2, 2, model.kv_heads, tokens, model.head_dim)
    documents = torch.zeros(2, job.data.sequence, dtype=torch.int32)
    path = folder / f"{torch.distributed.get_rank()}.json"
    if job.layout.context_form == "ring":
        out, log_sums = ring_attention(query, key, value, documents, 0, group)
        return peak_of(
            lambda: ring_attention_backward(out, query, key, value, out, log_sums, documents, 0, group), path
        )
    sent = exchange(torch.cat([query, *(part.repeat_interleave(2, 1) for part in (key, value))], 1), True, 2, group)
    # The gradient is no input, but made for it.
    return peak_of(lambda: exchange(sent, False, 2, group), path) + sent.nbytes


def peak_of(run: Callable[[], object], path: Path) -> int:
    """The most bytes that a call takes at once, the least of a few: gloo's thread may let go of its own too late."""
    peaks: list[int] = []
    for _ in range(5):
        with profile(profile_memory=True) as seen:
            run()
        seen.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
        held = itertools.accumulate(e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"]))
        peaks.append(max(held))
    return min(peaks)


@pytest.mark.parametrize(("form", "kv_heads"), [("ring", 4), ("ring", 1), ("all-to-all", 1)])
def test_buffers_are_what_the_operators_take(tmp_path: Path, form: str, kv_heads: int) -> None:
    job = small_job(tmp_path, form, kv_heads)
    predicted = context_buffer_bytes(job, cut_model(job))
    assert max(run_ranks(2, taken_bytes, tmp_path, job)) == pytest.approx(predicted, rel=0.15)


# --- The search ------------------------------------------------------------------------------------------------------


def test_long_sequences_are_divided() -> None:
    settings = ("model.max_positions=131072",)
    plan = build_plan(job_on("2x8xh100", "llama3-8b", 131072, 4, *settings))
    # Four sequences and sixteen devices.
    best = plan.ranked[0].layout
    assert best.context > 1 and best.world_size == 16
    assert any(p.layout.context_form == "all-to-all" for p in plan.ranked)
