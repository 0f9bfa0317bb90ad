"""Plans: what fits, in which order, why the others do not, and whether one device is enough; on screen and as JSON."""

import io
import re
import subprocess
import sys
from functools import partial

import msgspec
import pytest
from rich.console import Console

from meshwright.plan import Plan, build_plan, predict
from meshwright.plan.fit import SPARE, with_layout
from meshwright.plan.frame import build_frame
from meshwright.plan.machine import cpu_cluster
from meshwright.plan.objective import Goal
from meshwright.plan.plan import predict_framed, rank_predictions
from meshwright.plan.search import search_layouts
from meshwright.plan.verdict import explain_verdict
from meshwright.record import Prediction
from meshwright.report.plan import plan_json, plan_text
from meshwright.spec import ZOO, DataSettings, Job, Layout, ModelSpec, RunSettings, count_parameters
from meshwright.spec.decode import planning_job
from meshwright.spec.hardware import unknown_gpu


def job_on(gpus: str, model: str, sequence: int, global_batch: int, *settings: str) -> Job:
    return planning_job(model=model, gpus=gpus, sequence=sequence, global_batch=global_batch, settings=settings)


def small_job(processes: int = 4, *, global_batch: int = 32) -> Job:
    """Shaped like examples/quickstart.toml, on equal shares of this machine."""
    return Job(
        run=RunSettings(name="test", steps=1),
        model=ModelSpec(layers=4, d_model=128, heads=4, kv_heads=2, head_dim=32, feed_forward=384, vocabulary=257),
        data=DataSettings(sequence=256, global_batch=global_batch),
        layout=Layout(shard=processes, zero=2, precision="fp32"),
        cluster=cpu_cluster(processes),
    )


@pytest.fixture(scope="module")
def eight_h100() -> Plan:
    return build_plan(job_on("8xh100", "llama3-8b", 8192, 128, "layout.shard=8"))


def printed(plan: Plan) -> str:
    file = io.StringIO()
    plan_text(plan, Console(file=file, width=100, highlight=False))
    return file.getvalue()


def test_8b_on_8_h100_fits_sharded(eight_h100: Plan) -> None:
    assert eight_h100.job_fits
    assert eight_h100.ranked[0].layout.placement() == eight_h100.job.layout.placement() == "shard 8"
    assert all(p.memory.total() <= (1 - SPARE) * eight_h100.capacity_bytes for p in eight_h100.ranked)
    # torchtitan's docs: 39% MFU with recompute on 8 H100; 58% without on H200 (notes on GPU baselines).
    assert 0.4 < eight_h100.job.step.useful / eight_h100.job.step_s < 0.62


def test_8b_replicated_is_rejected_for_its_states(eight_h100: Plan) -> None:
    rejected = {r.layout.label(): r for r in eight_h100.rejected}["replica 8, microbatch 1, recompute full"]
    memory = rejected.memory
    assert memory is not None
    # 8.03e9 parameters: 4 bytes each for masters and gradients, 8 for moments; bf16 copies and whole gradients beside.
    assert memory.parameters == memory.gradients == pytest.approx(32.1e9, rel=0.01)
    assert memory.optimizer_states == pytest.approx(64.2e9, rel=0.01)
    assert "of 80.8 (5% stay free): optimizer states 64.2" in rejected.reason
    assert rejected.nearest == "shard 8, zero 3, microbatch 1"


def test_8b_does_not_fit_one_h100(eight_h100: Plan) -> None:
    assert eight_h100.one_device is None
    assert eight_h100.verdict.startswith("One device is not enough without offloading. The fewest that work: shard 2")
    assert "the fastest found is shard 8, zero 2" in eight_h100.verdict


def test_1b_fits_one_h200() -> None:
    alone = build_plan(job_on("1xh200", "llama-1b-untied", 4096, 8))
    assert alone.verdict.startswith("One device is enough: it fits")
    both = build_plan(job_on("2xh200", "llama-1b-untied", 4096, 16, "layout.shard=2"))
    assert both.verdict.startswith("One device is enough: it fits")
    assert "% of linear" in both.verdict
    assert both.one_device is not None
    gain = both.one_device.step_s / both.ranked[0].step_s
    assert 1.7 < gain < 2.1


def test_processes_of_one_machine_do_not_help() -> None:
    plan = build_plan(small_job())
    assert plan.ranked[0].layout.world_size == 1
    assert plan.verdict.startswith("One process is enough: it fits")
    assert "this job's 4 ranks" in plan.verdict
    assert "share its cores" in plan.verdict


def test_one_process_has_the_whole_machine() -> None:
    job = small_job()
    alone = msgspec.structs.replace(job, layout=Layout(precision="fp32"))
    whole = msgspec.structs.replace(alone, cluster=cpu_cluster(1))
    assert predict(alone).step.useful == pytest.approx(predict(whole).step.useful)


def test_a_batch_that_does_not_divide_is_rejected_with_the_nearest() -> None:
    plan = build_plan(job_on("8xh200", "llama-1b-untied", 4096, 12, "layout.shard=4"))
    rejected = {r.layout.world_size: r for r in plan.rejected}
    assert set(rejected) == {8}
    assert "does not divide data.global_batch = 12" in rejected[8].reason
    assert rejected[8].nearest


def test_microbatches_divide_the_ranks_share() -> None:
    for prediction in build_plan(small_job(global_batch=24)).ranked:
        assert (24 // prediction.layout.data_size) % prediction.layout.microbatch == 0


def prediction_of(step_s: float, layout: Layout) -> Prediction:
    return msgspec.structs.replace(predict(small_job()), layout=layout, step_s=step_s)


def test_ties_go_to_the_simpler_layout() -> None:
    both = prediction_of(1.000, Layout(replica=2, shard=2))
    four = prediction_of(1.005, Layout(shard=4))
    two = prediction_of(1.009, Layout(shard=2))
    slower = prediction_of(1.02, Layout())
    ranked = rank_predictions([slower, both, four, two])
    assert ranked == [two, four, both, slower]


def test_tensor_and_recompute_make_a_layout_less_simple() -> None:
    split = prediction_of(1.000, Layout(shard=2, tensor=2))
    again = prediction_of(1.004, Layout(shard=4, recompute="selective"))
    plain = prediction_of(1.008, Layout(shard=4))
    assert rank_predictions([split, again, plain])[0] == plain


def test_70b_needs_tensor_or_recompute_and_says_how_much() -> None:
    plan = build_plan(job_on("8x8xh100", "llama3-70b", 8192, 64))
    assert not plan.job_fits
    assert plan.ranked
    for prediction in plan.ranked:
        assert prediction.layout.tensor > 1 or prediction.layout.recompute != "none"
        assert prediction.memory.total() <= (1 - SPARE) * plan.capacity_bytes
        layers = prediction.layout.recompute
        if isinstance(layers, int):
            # As few as leave room: one fewer does not.
            fewer = msgspec.structs.replace(prediction.layout, recompute=layers - 1)
            job = job_on("8x8xh100", "llama3-70b", 8192, 64)
            memory = predict(msgspec.structs.replace(job, layout=fewer)).memory
            assert memory.total() > (1 - SPARE) * plan.capacity_bytes >= prediction.memory.total()
    # And where all is recomputed and it is not enough, it says so.
    assert any(r.layout.recompute == "full" and r.memory is not None for r in plan.rejected)


def test_what_fits_without_recompute_is_not_offered_with_it(eight_h100: Plan) -> None:
    ranked = [p.layout for p in eight_h100.ranked]
    plain = [layout for layout in ranked if layout.recompute == "none"]
    assert plain
    assert not [o for p in plain for o in ranked if o != p and msgspec.structs.replace(o, recompute="none") == p]


def test_tensor_stays_inside_a_node_and_divides_the_model() -> None:
    plan = build_plan(job_on("2x8xh100", "gpt2-1.5b", 1024, 64))
    # 25 heads: no power of two divides them.
    assert {p.layout.tensor for p in plan.ranked} == {1}
    reasons = {r.layout.tensor: r.reason for r in plan.rejected if r.layout.tensor > 1}
    assert set(reasons) == {2, 4, 8}
    assert all(reason == "does not divide model.heads = 25" for reason in reasons.values())
    sizes = {p.layout.tensor for p in build_plan(job_on("2x4xh100", "llama3-8b", 8192, 32)).ranked}
    assert sizes <= {1, 2, 4} and 2 in sizes


def test_ranks_of_the_tensor_axis_share_sequences() -> None:
    plan = build_plan(job_on("8xh200", "llama3-8b", 8192, 2, "layout.shard=2", "layout.tensor=4"))
    assert plan.job_fits
    assert any(p.layout.world_size == 8 for p in plan.ranked)
    refused = {r.layout.placement(): r.reason for r in plan.rejected if r.memory is None}
    assert "does not divide data.global_batch = 2" in refused["shard 8"]
    assert "shard 2 x tensor 4" not in refused


def test_async_tensor_is_kept_where_there_is_a_tensor_axis() -> None:
    job = job_on("8xh200", "llama3-8b", 8192, 16, "layout.shard=4", "layout.tensor=2", "layout.async_tensor=true")
    for prediction in build_plan(job).ranked:
        assert prediction.layout.async_tensor == (prediction.layout.tensor > 1)


@pytest.mark.parametrize("model", ["mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3"])
def test_mixtures_of_experts_are_planned_with_a_word_of_caution(model: str) -> None:
    plan = build_plan(job_on("64x8xh100", model, 8192 if model != "qwen3-30b-a3b" else 4096, 4096))
    assert plan.ranked
    assert any("assumed, not measured" in note for note in plan.job.notes)
    # All experts are held, few are computed with.
    best = plan.ranked[0]
    sharing = best.layout.world_size // best.layout.replica
    assert best.memory.parameters * sharing >= 4 * count_parameters(ZOO[model].spec)
    assert any(p.layout.expert > 1 for p in plan.ranked)
    assert max(len(line) for line in printed(plan).splitlines()) <= 100


def test_one_device_may_fit_with_recompute() -> None:
    plan = build_plan(job_on("1xh100", "llama-1b-untied", 8192, 16, "layout.microbatch=16"))
    assert not plan.job_fits
    assert plan.verdict.startswith("One device is enough: it fits")


def test_nothing_fits() -> None:
    plan = build_plan(job_on("1xrtx4090", "llama3-70b", 8192, 1))
    assert (plan.ranked, plan.job_fits) == ((), False)
    assert plan.verdict.startswith("Nothing fits")
    assert "none found" in printed(plan)


def test_an_unknown_device_is_planned_for_memory_alone() -> None:
    job = job_on("2xl40s", "llama-1b-untied", 2048, 2, "layout.shard=2")
    device = unknown_gpu("Tesla T4", 200e9).device
    plan = build_plan(msgspec.structs.replace(job, cluster=msgspec.structs.replace(job.cluster, device=device)))
    assert plan.verdict.startswith("One device is enough: it fits")
    assert "time is not" in printed(plan)
    assert "nan" not in printed(plan)


def test_the_screen_says_what_matters(eight_h100: Plan) -> None:
    text = printed(eight_h100)
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "\x1b" not in text
    assert text.isascii()
    for words in (
        "Verdict",
        "This job: shard 8, zero 3",
        "useful",
        "of 85.0 GB",
        "MFU",
        "rejected",
        "nearest that works",
    ):
        assert words in text
    # Largest bucket first.
    assert text.index("useful ") < text.index("inefficiency ") < text.index("the other buckets")


def test_json_gives_the_plan_back(eight_h100: Plan) -> None:
    assert msgspec.json.decode(plan_json(eight_h100), type=Plan) == eight_h100


@pytest.mark.parametrize(
    ("gpus", "model", "global_batch"),
    [
        ("8xh100", "llama3-8b", 128),
        ("128x8xh100", "llama3-8b", 4096),
        ("64x8xh100", "llama3-70b", 2048),
        ("64x8xh100", "llama3.1-405b", 512),
    ],
)
def test_a_search_stays_small(gpus: str, model: str, global_batch: int) -> None:
    """Each layout that is predicted takes under a millisecond."""
    assert build_plan(job_on(gpus, model, 8192, global_batch)).considered < 3000


def test_the_command_loads_nothing_large() -> None:
    """How quick it is, benchmarks/planning_speed.py shows."""
    code = (
        "import sys; from meshwright.cli import cli\n"
        "cli(['plan', '--model', 'llama3-8b', '--gpus', '8xh100', '--sequence', '8192', '--json'],"
        " standalone_mode=False)\n"
        "assert not {'torch', 'numpy', 'rich', 'plotly'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert msgspec.json.decode(done.stdout)["job_fits"]


def test_the_first_of_layouts_that_tie_is_not_called_the_fastest() -> None:
    job = job_on("8xh100", "llama3-8b", 8192, 16)
    prediction = predict(job)
    wider = msgspec.structs.replace(job.layout, tensor=2, shard=4)
    simple = msgspec.structs.replace(prediction, layout=wider)
    quicker = msgspec.structs.replace(prediction, step_s=0.995 * prediction.step_s)
    fewest = msgspec.structs.replace(prediction, layout=msgspec.structs.replace(job.layout, shard=4), step_s=9.0)
    assert "; the simplest within 1% of the fastest found is" in explain_verdict(
        job, prediction, None, [simple, quicker, fewest]
    )
    assert "; the fastest found is" in explain_verdict(job, prediction, None, [quicker, simple, fewest])


def test_offloading_is_offered_where_nothing_else_fits() -> None:
    job = job_on("2xh100", "llama3.1-8b", 16384, 2)
    plan = build_plan(job)
    assert plan.ranked and not plan.job_fits
    assert {p.layout.offload for p in plan.ranked} <= {"optimizer", "parameters"}
    # It is not what one device is called enough for.
    assert plan.one_device is None
    assert plan.verdict.startswith("One device is not enough")


def test_a_host_that_is_too_small_is_said_to() -> None:
    """70B and its states are 1.1 TB."""
    plan = build_plan(job_on("1xh200", "llama3-70b", 2048, 1), Goal(fixed={"offload": "parameters"}))
    assert plan.ranked == ()
    assert any("a host is taken to have 250.0" in one.reason for one in plan.rejected)


def test_candidates_that_recompute_are_predicted_with_their_own_stages() -> None:
    """Stages are balanced by what their blocks recompute."""
    job = job_on("4xh100", "llama3-8b", 8192, 64)
    found, _ = search_layouts(job, partial(predict_framed, brief=True))
    again = [one for one in found if one.layout.pipeline > 1 and one.layout.recompute != "none"]
    assert any(isinstance(one.layout.recompute, int) for one in again)
    for one in again:
        alone = predict_framed(with_layout(job, one.layout), build_frame(with_layout(job, one.layout)), brief=True)
        assert (one.memory, one.step_s) == (alone.memory, alone.step_s)


def test_one_device_that_could_be_faster_alone_says_how() -> None:
    """The same rank with a larger microbatch; and a goal's hours have an interval."""
    slow = build_plan(job_on("1xh200", "llama-1b-untied", 4096, 8, "layout.microbatch=1"))
    assert "% faster as one process, microbatch 8 than as this job has it" in slow.verdict
    hours = Goal(objective="fewest", tokens=10**10, deadline_hours=100)
    enough = build_plan(job_on("8xh100", "llama3-8b", 8192, 128), hours)
    assert re.search(r"enough: [\d.]+ hours of 100 \(80% interval [\d.]+ to [\d.]+\)", enough.verdict)


def test_fixed_settings_that_fit_nowhere_are_said_to() -> None:
    """Not that the job's own layout fits, which is another."""
    plan = build_plan(job_on("8xh100", "llama3-8b", 8192, 128), Goal(fixed={"schedule": "gpipe", "pipeline": 2}))
    assert plan.ranked == () and plan.job_fits
    assert plan.verdict.startswith(
        "Nothing fits on 8 x h100 with layout.schedule and layout.pipeline fixed: pipeline 2"
    )
    assert "stay free)" in plan.verdict


def test_a_deadline_where_no_speed_is_known() -> None:
    job = job_on("8xh100", "llama3-8b", 8192, 128)
    device = msgspec.structs.replace(job.cluster.device, peak_bf16_flops_per_s=0.0, peak_fp32_flops_per_s=0.0)
    job = msgspec.structs.replace(job, cluster=msgspec.structs.replace(job.cluster, device=device))
    plan = build_plan(job, Goal(objective="fewest", tokens=10**10, deadline_hours=100))
    assert plan.verdict.startswith("What makes 100 hours is not known, because the device's peak is not.")


def test_what_a_host_cannot_hold_is_why_nothing_fits() -> None:
    """Each rank holds all of 70B where nothing is divided."""
    fixed = {"offload": "parameters", "shard": 1, "tensor": 1, "pipeline": 1, "context": 1}
    plan = build_plan(job_on("8xb300", "llama3-70b", 2048, 8), Goal(fixed=fixed))
    assert plan.ranked == () and plan.job_fits
    assert "a host is taken to have 250.0" in plan.verdict
