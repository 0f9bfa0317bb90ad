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


def test_the_command_compares() -> None:
    done = run("plan", "--model", "llama3-8b", "--cluster", "8xh100", "--cluster", "8xa100-80", "--tokens", "1e10")
    assert done.returncode == 0 and "Take 8xh100" in done.stdout
    refused = run("plan", "--model", "llama3-8b", "--cluster", "8xh100", "--cluster", "8xa100-80", "--html", "x.html")
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
