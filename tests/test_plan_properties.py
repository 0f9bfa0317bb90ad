"""What holds of every prediction, whatever the job, the layout and the cluster."""

from functools import partial
from math import isfinite, prod

import msgspec
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from benchmarks.search_check import random_job
from meshwright.plan import predict
from meshwright.plan.fit import room_bytes, with_layout
from meshwright.plan.plan import predict_framed
from meshwright.plan.search import search_layouts
from meshwright.spec import AXES, Job, Layout, Link, SettingError, check_job

# Rounding in sums of seconds.
CLOSE = 1e-9

# The same examples each time: whoever changes something else is not to be stopped by a new one.
every = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.filter_too_much])
some = settings(max_examples=12, deadline=None, derandomize=True)

sizes = st.sampled_from((1, 1, 2, 4))
jobs = st.integers(0, 10**6).map(random_job)


@st.composite
def laid_out(draw: st.DrawFn) -> Job:
    """A job in any legal layout."""
    job = draw(jobs)
    pipeline = draw(sizes)
    schedules = ("1f1b", "gpipe", "interleaved", "zero-bubble", "zbv", "dualpipev") if pipeline > 1 else ("1f1b",)
    context = draw(sizes)
    layout = Layout(
        pipeline=pipeline,
        replica=draw(sizes),
        shard=draw(sizes),
        context=context,
        tensor=draw(sizes),
        expert=draw(sizes) if job.model.experts else 1,
        order=tuple(draw(st.permutations(AXES))),
        microbatch=draw(st.sampled_from((1, 1, 2, 4))),
        zero=draw(st.sampled_from((1, 2, 3))),
        recompute=draw(st.one_of(st.sampled_from(("none", "selective", "full")), st.integers(0, job.model.layers))),
        schedule=draw(st.sampled_from(schedules)),
        context_form=draw(st.sampled_from(("ring", "all-to-all"))) if context > 1 else "ring",
        offload=draw(st.sampled_from(("none", "none", "optimizer", "parameters"))),
    )
    job = with_layout(job, layout)
    try:
        check_job(job)
    except SettingError:
        assume(False)
    return job


def with_memory(job: Job, share: float) -> Job:
    """The job on devices with so much of their memory."""
    device = msgspec.structs.replace(job.cluster.device, memory_bytes=job.cluster.device.memory_bytes * share)
    return msgspec.structs.replace(job, cluster=msgspec.structs.replace(job.cluster, device=device))


def faster(link: Link, share: float) -> Link:
    """A link with so much of its bandwidth, and its latency the shorter for it."""
    return msgspec.structs.replace(link, bytes_per_s=link.bytes_per_s * share, latency_s=link.latency_s / share)


@every
@given(laid_out())
def test_predictions_are_finite_and_the_account_sums(job: Job) -> None:
    one = predict(job)
    seconds, sizes_bytes = dict(one.step.rows()), dict(one.memory.rows())
    assert isfinite(one.step_s) and one.step_s > 0
    # What is left of compute once useful work at the datasheet's peak is taken off may be less than nothing: work is
    # counted over the full square of attention.
    assert all(
        isfinite(value) and (value >= -CLOSE * one.step_s or name == "inefficiency") for name, value in seconds.items()
    )
    assert abs(sum(seconds.values()) - one.step_s) <= CLOSE * one.step_s
    assert all(isfinite(value) and value >= 0 for value in sizes_bytes.values())
    assert abs(sum(sizes_bytes.values()) - one.memory.total()) <= CLOSE * one.memory.total()
    low_s, high_s = one.step_interval_s
    assert 0 < low_s <= one.step_s <= high_s
    tokens = job.data.global_batch * job.data.sequence
    assert abs(one.tokens_per_s * one.step_s - tokens) <= CLOSE * tokens
    assert job.layout.world_size == prod(job.layout.size(axis) for axis in AXES)


@every
@given(laid_out(), st.sampled_from((1.5, 3.0, 20.0)), st.sampled_from(("intra", "inter")))
def test_faster_links_never_make_a_step_slower(job: Job, share: float, which: str) -> None:
    links = {which: faster(getattr(job.cluster, which), share)}
    quick = msgspec.structs.replace(job, cluster=msgspec.structs.replace(job.cluster, **links))
    assert predict(quick).step_s <= predict(job).step_s * (1 + 1e-6)


@every
@given(laid_out(), st.sampled_from((1.01, 1.5, 8.0)))
def test_more_memory_needs_no_more_memory(job: Job, share: float) -> None:
    assert predict(with_memory(job, share)).memory.total() == predict(job).memory.total()


@some
@given(jobs, st.sampled_from((1.1, 2.0)))
def test_more_memory_never_makes_a_plan_infeasible_or_slower(job: Job, share: float) -> None:
    brief = partial(predict_framed, brief=True)
    before, _ = search_layouts(job, brief)
    after, _ = search_layouts(with_memory(job, share), brief)
    if before:
        assert after
        assert min(p.step_s for p in after) <= min(p.step_s for p in before) * (1 + CLOSE)


@some
@given(jobs)
def test_every_layout_found_is_legal_and_fits(job: Job) -> None:
    found, rejected = search_layouts(job, partial(predict_framed, brief=True))
    for one in found:
        check_job(with_layout(job, one.layout))
        assert one.layout.world_size == prod(one.layout.size(axis) for axis in AXES) <= job.cluster.devices
        assert one.memory.total() <= room_bytes(with_layout(job, one.layout))
    for one in rejected:
        assert one.reason
        if one.memory is not None:
            assert one.memory.total() > room_bytes(with_layout(job, one.layout))
