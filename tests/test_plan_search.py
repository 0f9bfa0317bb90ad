"""The search finds what predicting every layout finds, for each goal, with what is fixed, and says what would do."""

from functools import partial
from typing import Any

import msgspec
import pytest

from benchmarks.search_check import check_case
from meshwright.cli.goal import read_goal
from meshwright.plan import Goal, Plan, build_plan
from meshwright.plan.frame import build_frame
from meshwright.plan.plan import predict_framed
from meshwright.plan.search import search_layouts
from meshwright.plan.smallest import least_layout, longest_sequence, smallest_cluster
from meshwright.spec import Job, SettingError, count_parameters
from meshwright.spec.decode import planning_job

BRIEF = partial(predict_framed, brief=True)
LINKS = ("intra", "inter")


def job_on(gpus: str, model: str = "llama3-8b", sequence: int = 8192, global_batch: int = 32) -> Job:
    return planning_job(model=model, gpus=gpus, sequence=sequence, global_batch=global_batch)


def slow(job: Job) -> Job:
    """The same job with a poor network between nodes."""
    inter = msgspec.structs.replace(job.cluster.inter, bytes_per_s=1e9)
    return msgspec.structs.replace(job, cluster=msgspec.structs.replace(job.cluster, inter=inter))


@pytest.mark.parametrize("seed", [2, 5, 45])
def test_the_search_finds_the_best_of_all(seed: int) -> None:
    """benchmarks/search_check.py has fifty such cases."""
    line, same = check_case(seed)
    assert same, line


@pytest.mark.parametrize("bytes_per_s", [2e9, 2e10])
def test_fewer_devices_are_found_where_more_are_slower(bytes_per_s: float) -> None:
    """All 16 must divide each product for a batch of 2, over links that are slower than that gains."""
    job = job_on("2x8xh200", "llama-1b-untied", sequence=1024, global_batch=2)
    links = {name: msgspec.structs.replace(getattr(job.cluster, name), bytes_per_s=bytes_per_s) for name in LINKS}
    job = msgspec.structs.replace(job, cluster=msgspec.structs.replace(job.cluster, **links))
    found, _ = search_layouts(job, BRIEF)
    each = [search_layouts(job, BRIEF, ranks=[ranks], most=1)[0] for ranks in (1, 2, 4, 8, 16)]
    assert min(p.step_s for p in found) == min(p.step_s for some in each for p in some)


def test_what_the_search_shares_changes_no_prediction() -> None:
    job = job_on("4x8xh100", "llama3-70b", global_batch=64)
    found, _ = search_layouts(job, BRIEF)
    assert {p.layout.pipeline > 1 for p in found} == {True, False}
    for one in found:
        own = msgspec.structs.replace(job, layout=one.layout)
        assert one == predict_framed(own, build_frame(own), brief=True)


@pytest.mark.parametrize(
    "fixed",
    [
        {"tensor": 4},
        {"pipeline": 3, "schedule": "gpipe"},
        {"recompute": 5, "zero": 2},
        {"order": ("shard", "pipeline", "replica", "context", "tensor"), "microbatch": 2},
        {"offload": "optimizer"},
        {"offload": "parameters"},
        {"offload": "optimizer", "pipeline": 2, "schedule": "1f1b"},
        {"context": 2, "context_form": "all-to-all", "replica": 2},
    ],
)
def test_what_is_fixed_stays(fixed: dict[str, Any]) -> None:
    """Also where the search would not have tried it."""
    job = job_on("6xh200" if fixed.get("pipeline") == 3 else "2x8xh200", global_batch=48)
    plan = build_plan(job, Goal(fixed=fixed))
    assert plan.ranked
    assert {tuple(getattr(p.layout, name) for name in fixed) for p in plan.ranked} == {tuple(fixed.values())}


@pytest.mark.parametrize(
    ("fixes", "words"),
    [
        (["layout.tensor=3"], "--fix layout.tensor=3"),
        (["layout.tensor=16", "layout.shard=4"], "--fix layout.tensor=16 --fix layout.shard=4"),
        (["layout.tensor=4", "layout.tensor=8"], "contradict each other"),
        (["layout.schedule=zbv", "layout.pipeline=1"], "--fix layout.schedule=zbv"),
        (["layout.tenser=4"], "layout.tensor"),
        (["data.sequence=4096"], "only settings of the layout"),
        (["layout.tensor=-1"], "at least one rank"),
        (["layout.tensor"], "must look like"),
        (["layout.recompute=99"], "must be a number of blocks"),
        (["layout.microbatch=0"], "must be at least 1"),
    ],
)
def test_what_cannot_be_fixed_is_refused(fixes: list[str], words: str) -> None:
    def plan_with() -> Plan:
        return build_plan(job_on("8xh100"), read_goal("fastest", None, None, fixes, curve=False, noise_tokens=None))

    with pytest.raises(SettingError) as raised:
        plan_with()
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_is_fixed_is_not_blamed_on_memory_nor_memory_on_it() -> None:
    small = build_plan(job_on("8xh200", "llama-1b-untied"), Goal(fixed={"tensor": 2}))
    assert "One device is not enough with layout.tensor fixed." in small.verdict
    # Its devices can be divided so; they hold too little.
    large = build_plan(job_on("8xh100", "llama3-70b"), Goal(fixed={"pipeline": 4}))
    assert "Nothing fits" in large.verdict and "The smallest cluster that would do" in large.verdict


def test_what_only_fits_offloaded_is_not_called_the_longest() -> None:
    plan = build_plan(job_on("1xh100", "llama3.1-8b"), Goal(objective="longest"))
    assert plan.ranked and all(p.layout.offload != "none" for p in plan.ranked)
    assert "only with a part of it offloaded" in plan.verdict and "The longest" not in plan.verdict


@pytest.mark.parametrize(
    ("goal", "words"),
    [
        (Goal(objective="fewest"), "needs a number of tokens and a deadline"),
        (Goal(deadline_hours=3.0), "is for --objective fewest"),
        (Goal(objective="fewest", tokens=10**9, deadline_hours=-1.0), "must be a number above 0"),
        (Goal(noise_tokens=1e6), "is for the scaling curve"),
        (Goal(noise_tokens=float("nan"), curve=True), "must be a number above 0"),
    ],
)
def test_goals_that_lack_something_are_refused(goal: Goal, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        build_plan(job_on("8xh100"), goal)


def test_the_cheapest_wastes_less_than_the_fastest() -> None:
    job = slow(job_on("4x8xh100", "llama-1b-untied"))
    cheapest, fastest = (build_plan(job, Goal(objective=word)).ranked[0] for word in ("cheapest", "fastest"))
    assert cheapest.layout.world_size * cheapest.step_s < fastest.layout.world_size * fastest.step_s
    assert cheapest.step_s > fastest.step_s


def test_what_is_called_the_cheapest_is() -> None:
    """Also where the plan is for the fastest, which are others."""
    job = slow(job_on("4x8xh100", global_batch=64))
    job = msgspec.structs.replace(job, cluster=msgspec.structs.replace(job.cluster, price_per_device_hour=2.5))
    fastest, cheapest = (build_plan(job, Goal(objective=word)).costs for word in ("fastest", "cheapest"))
    assert fastest is not None and cheapest is not None and fastest.cheapest is not None
    assert fastest.cheapest == cheapest.cheapest != fastest.first


def test_the_fewest_devices_meet_the_deadline_and_fewer_do_not() -> None:
    job = job_on("4x8xh100")
    goal = Goal(objective="fewest", tokens=10**10, deadline_hours=40.0)
    best = build_plan(job, goal).ranked[0]
    hours = 1e10 / best.tokens_per_s / 3600
    assert hours <= 40
    half, _ = search_layouts(job, BRIEF, ranks=[best.layout.world_size // 2], most=1)
    assert not half or min(p.step_s for p in half) > (goal.step_limit_s(job) or 0)
    late = build_plan(job, Goal(objective="fewest", tokens=10**13, deadline_hours=1.0))
    assert "No number of devices here makes 1 hour." in late.verdict


def test_a_device_that_offloads_is_enough_where_the_deadline_is_far() -> None:
    plan = build_plan(job_on("8xh100"), Goal(objective="fewest", tokens=10**9, deadline_hours=1e5))
    assert {p.layout.world_size for p in plan.ranked} == {1}
    assert plan.verdict.startswith("1 device is enough: ") and "is not enough without offloading. " in plan.verdict


def test_the_longest_sequence_fits_and_a_longer_one_does_not() -> None:
    job = job_on("8xh100", "llama-1b-untied", global_batch=8)
    job = msgspec.structs.replace(job, model=msgspec.structs.replace(job.model, max_positions=0))
    longest = longest_sequence(job)
    assert longest is not None and longest > 8192

    def with_sequence(tokens: int) -> Job:
        return msgspec.structs.replace(job, data=msgspec.structs.replace(job.data, sequence=tokens))

    assert least_layout(with_sequence(longest), 8) is not None
    assert least_layout(with_sequence(2 * longest), 8) is None
    plan = build_plan(job, Goal(objective="longest"))
    assert plan.sequence == longest and plan.ranked and f"{longest:,} tokens" in plan.verdict


def test_the_largest_model_keeps_its_shape() -> None:
    job = job_on("8xh100", "llama-1b-untied", global_batch=8)
    plan = build_plan(job, Goal(objective="largest"))
    assert plan.ranked and "The largest model of this shape" in plan.verdict
    scaled = float(plan.model.rpartition(" x ")[2])
    assert scaled > 1
    assert count_parameters(job.model) < job.cluster.device.memory_bytes * 8 / 16


def test_a_model_that_fits_nothing_gets_the_smallest_cluster_that_would_do() -> None:
    job = job_on("8xh100", "llama3.1-405b", global_batch=512)
    plan = build_plan(job)
    assert plan.ranked == ()
    assert "The smallest cluster that would do without offloading: 16 nodes of 8 x h100" in plan.verdict
    assert "; with it, 4 nodes of 8 x h100 (" in plan.verdict
    found = smallest_cluster(job)
    assert found is not None
    half = msgspec.structs.replace(found[0], nodes=found[0].nodes // 2)
    assert least_layout(msgspec.structs.replace(job, cluster=half), half.devices) is None


@pytest.fixture(scope="module")
def scaled() -> Plan:
    job = slow(job_on("4x8xh100", "llama-1b-untied", global_batch=64))
    return build_plan(job, Goal(curve=True, noise_tokens=262144.0))


def test_the_curve_falls_to_its_knee(scaled: Plan) -> None:
    curve = scaled.curve
    assert curve is not None
    assert [point.devices for point in curve.points] == [1, 2, 4, 8, 16, 32]
    assert max(point.efficiency for point in curve.points) == 1
    assert curve.points[-1].efficiency < 0.8 < curve.points[2].efficiency
    # Its best point is what the plan itself found.
    assert min(point.step_s for point in curve.points) == min(p.step_s for p in scaled.ranked)
    above = [point.devices for point in curve.points if point.efficiency >= 0.8]
    assert curve.knee == max(above)


def test_a_noise_scale_says_how_large_a_batch_may_be(scaled: Plan) -> None:
    noise = scaled.curve.noise if scaled.curve else None
    assert noise is not None
    # Twice the noise scale: a third of each token counts (arXiv:1812.06162, equation 2.11).
    assert noise.batch_efficiency == pytest.approx(1 / 3)
    inner = scaled.ranked[0].layout
    assert noise.devices == 32 * inner.pipeline * inner.context * inner.tensor
