"""Offers of machines compared, interruptions counted, and the plan as a page."""

import json
import re
from math import sqrt
from pathlib import Path
from typing import Any

import msgspec
import pytest
from commands import run

from meshwright.plan import Goal, Offer, build_plan, decide, make_offer
from meshwright.plan.interruptions import predict_interruptions
from meshwright.report.plan_page import write_plan
from meshwright.spec import Job, count_parameters
from meshwright.spec.decode import planning_job


def job_on(gpus: str, *settings: str, model: str = "llama3-8b") -> Job:
    """Some 1 M tokens a step."""
    return planning_job(model=model, gpus=gpus, sequence=8192, global_batch=128, settings=settings)


def offer(gpus: str, price: float | None = None, **told: float) -> Offer:
    job = job_on(gpus)
    job = msgspec.structs.replace(
        job, cluster=msgspec.structs.replace(job.cluster, price_per_device_hour=price, **told)
    )
    return make_offer(gpus, job, build_plan(job), 10**11)


def offer_by(deadline_hours: float, gpus: str, price: float | None = None, **told: float) -> Offer:
    """Planned for the fewest devices that train on 10^11 tokens by then."""
    job = job_on(gpus)
    job = msgspec.structs.replace(
        job, cluster=msgspec.structs.replace(job.cluster, price_per_device_hour=price, **told)
    )
    goal = Goal(objective="fewest", tokens=10**11, deadline_hours=deadline_hours)
    return make_offer(gpus, job, build_plan(job, goal), goal.tokens)


def hours_needed(one: Offer) -> tuple[float, ...]:
    assert one.days is not None
    return tuple(24 * days for days in one.days)


def figures_of(page: Path) -> dict[str, Any]:
    """What a page draws."""
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_interruptions_by_hand() -> None:
    job = job_on("8x8xh100")
    job = msgspec.structs.replace(job, cluster=msgspec.structs.replace(job.cluster, device_hours_per_failure=6400.0))
    best = build_plan(job).ranked[0]
    found = predict_interruptions(job, best)
    # 6,400 device-hours over 64 devices: one in 100 hours.
    assert best.layout.world_size == 64 and found.per_day == pytest.approx(0.24)
    # Twelve bytes a parameter over 64 GB/s; Young's interval; half of it and ten minutes are lost each time.
    save_s = 12 * count_parameters(job.model) / 64e9
    assert found.save_s == pytest.approx(save_s) and found.interval_s == pytest.approx(sqrt(2 * save_s * 360_000))
    lost = save_s / found.interval_s + (found.interval_s / 2 + 600) / 360_000
    assert found.productive == pytest.approx(1 - lost)


def test_more_failures_leave_less() -> None:
    often, seldom = (offer("8x8xh100", device_hours_per_failure=hours) for hours in (500.0, 50_000.0))
    assert often.interruptions and seldom.interruptions and often.days and seldom.days
    assert often.interruptions.interval_s < seldom.interruptions.interval_s
    assert often.tokens_per_s < seldom.tokens_per_s and often.days[1] > seldom.days[1]


def test_the_fastest_is_taken_without_prices_and_the_cheapest_token_with() -> None:
    fast, slow = offer("8x8xh100"), offer("4x8xh100")
    assert decide([slow, fast]).taken == "8x8xh100"
    dear, cheap = offer("8x8xh100", 9.0), offer("8x8xa100-80", 1.0)
    decision = decide([dear, cheap])
    assert dear.tokens_per_s > cheap.tokens_per_s and decision.taken == "8x8xa100-80"
    assert dear.million_tokens and cheap.million_tokens and dear.million_tokens > cheap.million_tokens
    # A price is of all devices for as long as it takes.
    assert cheap.cost and cheap.days and cheap.cost[1] == pytest.approx(cheap.days[1] * 24 * 64 * 1.0)
    assert cheap.days[0] < cheap.days[1] < cheap.days[2]
    assert any("interrupted" in line for line in decision.lines)


def test_what_cannot_run_the_job_is_not_taken() -> None:
    large = job_on("1xrtx4090", model="llama3-70b")
    small = make_offer("1xrtx4090", large, build_plan(large), None)
    assert small.best is None and decide([small]).taken == ""
    decision = decide([small, offer("8xh100")])
    assert decision.taken == "8xh100" and any("1xrtx4090" in line for line in decision.lines)


def test_what_misses_the_deadline_is_not_taken_while_another_meets_it() -> None:
    # Far dearer for each token, and the only one in time.
    dear, cheap = offer_by(100.0, "8x8xh100", 9.0), offer_by(100.0, "8xh100", 0.1)
    assert hours_needed(dear)[1] < 100 < hours_needed(cheap)[1]
    assert decide([dear, cheap]).taken == "8xh100"
    decision = decide([dear, cheap], 100.0)
    assert decision.taken == "8x8xh100" and decision.missed == ("8xh100",)
    assert "it alone meets the deadline" in decision.lines[0] and "meets the deadline of 100 hours" in decision.lines[1]
    assert any(line.startswith("8xh100 takes") and "more than the deadline" in line for line in decision.lines)


def test_the_slow_end_of_the_interval_may_miss_the_deadline() -> None:
    one = offer("8x8xh100")
    _, middle, high = hours_needed(one)
    tight, wide = decide([one], (middle + high) / 2), decide([one], 2 * high)
    assert tight.taken == wide.taken == one.name
    assert f"it would miss it by {(high - middle) / 2:.3g} hours" in tight.lines[1]
    assert "would miss" not in wide.lines[1]


def test_no_offer_is_taken_where_none_meets_the_deadline() -> None:
    offers = [offer_by(10.0, "8xh100"), offer_by(10.0, "8x8xh100")]
    decision = decide(offers, 10.0)
    assert decision.taken == "" and decision.missed == ("8x8xh100", "8xh100")
    assert f"misses the deadline of 10 hours by {hours_needed(offers[1])[1] - 10:.3g} hours" in decision.lines[0]


def test_interruptions_count_against_the_deadline() -> None:
    often = offer("8x8xh100", device_hours_per_failure=500.0)
    assert often.interruptions is not None
    # As long as it takes without them.
    deadline_hours = hours_needed(often)[1] * (often.interruptions.productive + 1) / 2
    decision = decide([often], deadline_hours)
    assert decision.taken == "" and "by interruptions alone" in decision.lines[1]
    # Of a plan's layouts, the first that meets it with them is the offer's.
    assert decide([offer_by(deadline_hours, "16x8xh100")], deadline_hours).taken == "16x8xh100"


def test_steps_of_other_sizes_are_told() -> None:
    one = offer("8xh100")
    job = planning_job(model="llama3-8b", gpus="4x8xh100", sequence=8192, global_batch=512, settings=())
    other = make_offer("4x8xh100", job, build_plan(job), None)
    assert (one.step_tokens, other.step_tokens) == (128 * 8192, 512 * 8192)
    told = [line for line in decide([one, other]).lines if "tokens a step" in line]
    assert len(told) == 1 and "1,048,576" in told[0] and "4,194,304" in told[0] and "--global-batch 512" in told[0]
    assert not any("tokens a step" in line for line in decide([one, offer("4x8xh100")]).lines)


def test_what_overlaps_is_named_and_large_factors_are_no_percentages() -> None:
    near = decide([offer("8x8xh100"), offer("8x8xmi300x")])
    assert any("intervals of tokens/s overlap" in line for line in near.lines)
    priced = decide([offer("8x8xh100", 3.0), offer("8x8xmi300x", 3.0)])
    assert any("intervals of what a million tokens cost overlap" in line for line in priced.lines)
    far = decide([offer("8x8xh100"), offer("1x8xv100-32")])
    assert any("times as slow as predicted" in line for line in far.lines)
    assert not any(re.search(r"\d{3,}%", line) for line in far.lines if line.startswith("It stands"))


@pytest.mark.parametrize(("hours", "often"), [(190.0, "about once a day"), (96.0, "2.0 times a day"), (1e4, "52 days")])
def test_how_often_is_said_in_words(hours: float, often: str) -> None:
    lines = decide([offer("8xh100", device_hours_per_failure=hours)]).lines
    assert any(f"are interrupted {'every ' if 'days' in often else ''}{often}" in line for line in lines)


def test_doubts_of_the_taken_offer_and_missing_prices_are_told() -> None:
    decision = decide([offer("8xh100"), offer("8xmi300x")])
    assert decision.taken == "8xmi300x"
    assert any(line.startswith("Of 8xmi300x:") and "unproven on AMD" in line for line in decision.lines)
    alike = decide([offer("8xh100"), offer("4x8xh100")])
    assert not any(line.startswith("Of ") or "Speed decides" in line for line in alike.lines)
    some = decide([offer("8xh100", 2.0), offer("4x8xh100")])
    assert "Speed decides, because not all have a price: 4x8xh100 has none." in some.lines
    assert not any("Speed" in line for line in decide([offer("8xh100", 2.0), offer("4x8xh100", 2.0)]).lines)


def test_the_command_compares() -> None:
    on_two = ("--model", "llama3-8b", "--cluster", "8xh100", "--cluster", "8xa100-80")
    done = run("plan", *on_two, "--tokens", "1e10")
    assert done.returncode == 0 and "Take 8xh100" in done.stdout
    late = run("plan", *on_two, "--tokens", "1e12", "--objective", "fewest", "--deadline-hours", "10")
    assert late.returncode == 0 and "Take none of them: the nearest misses the deadline of 10 hours" in late.stdout
    refused = run("plan", *on_two, "--html", "x.html")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1


def test_the_page_draws_what_the_plan_says(tmp_path: Path) -> None:
    job = job_on("2x8xh100", "layout.pipeline=4", "layout.shard=4", "layout.zero=1", "layout.recompute=full")
    plan = build_plan(job, Goal(curve=True, noise_tokens=4e6))
    write_plan(plan, tmp_path / "plan.html")
    figures = figures_of(tmp_path / "plan.html")
    assert figures.keys() == {"step", "memory", "pipeline", "curve"}
    # Every rank along the pipeline, its terms together what the plan predicts of it.
    bars = figures["memory"]["data"]
    assert len(plan.memories) == 4
    for place, account in enumerate(plan.memories):
        assert sum(bar["x"][place] for bar in bars) * 1e9 == pytest.approx(account.total(), rel=1e-3)
    assert max(account.total() for account in plan.memories) == pytest.approx(plan.job.memory.total())
    own = sum(bar["x"][0] for bar in figures["step"]["data"] if bar["y"][0].startswith("this job"))
    # It is drawn in milliseconds.
    assert own == pytest.approx(1e3 * plan.job.step_s, rel=1e-2)
    assert plan.curve and [p.devices for p in plan.curve.points] == figures["curve"]["data"][2]["x"]
