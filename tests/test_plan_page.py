"""What a reader sees of plans that are not usual: none that fits, prices, steps that take days."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from meshwright.plan import Goal, Plan, build_plan
from meshwright.report.plan import plan_text, seconds_text
from meshwright.report.plan_page import write_plan
from meshwright.spec.decode import planning_job


def plan_of(*settings: str, model: str = "llama3-8b", tokens: int | None = None) -> Plan:
    job = planning_job(model=model, gpus="2x8xh100", sequence=8192, global_batch=128, settings=settings)
    return build_plan(job, Goal(tokens=tokens))


def page_of(plan: Plan, folder: Path) -> tuple[str, dict[str, Any]]:
    """The words of a page, and what it draws."""
    write_plan(plan, folder / "plan.html")
    page = (folder / "plan.html").read_text(encoding="utf-8")
    figures = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    body = re.search(r"<main>(.*)</main>", page, re.DOTALL)
    assert figures is not None and body is not None
    return body[1], json.loads(figures[1])


def screen(plan: Plan, width: int) -> list[str]:
    file = io.StringIO()
    plan_text(plan, Console(file=file, width=width, force_terminal=True, color_system=None))
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_a_page_says_where_nothing_fits(tmp_path: Path) -> None:
    plan = plan_of(model="llama3.1-405b")
    assert not plan.job_fits and not plan.ranked
    body, figures = page_of(plan, tmp_path)
    cards = re.findall(r'<div class="name">(.*?)</div><div class="value">(.*?)</div>', body)
    assert cards[0] == ("Fit", "Does not fit")
    assert {"Step, if it fitted", "Tokens per second, if it fitted"} <= {name for name, _ in cards}
    assert "layouts that fit" not in body.lower() and "which does not fit" in body
    assert figures["step"]["data"][0]["y"] == [f"this job: {plan.job.layout.label()}"]


def test_a_page_says_whose_figures_its_cards_are(tmp_path: Path) -> None:
    plan = plan_of("layout.shard=16")
    first = plan.ranked[0].layout.label()
    assert plan.job_fits and first != plan.job.layout.label()
    body, _ = page_of(plan, tmp_path)
    above, _ = body.split('<div class="tiles">')
    assert f"This job: {plan.job.layout.label()}" in above and f"first of all that fit is {first}" in above
    assert "Does not fit" not in body and "Layouts that fit" in body


def test_a_page_has_costs_and_days(tmp_path: Path) -> None:
    plan = plan_of("cluster.price_per_device_hour=2", tokens=10**11)
    costs = plan.costs
    assert costs is not None and costs.own.run is not None and costs.own.run_s is not None
    body, _ = page_of(plan, tmp_path)
    assert f"{costs.own.run:,.0f}" in body and f"{costs.own.run_s / 86400:.3g} days" in body
    assert costs.first is not None and f"{costs.first.layout.label()}: " in body
    timed, _ = page_of(plan_of(tokens=10**11), tmp_path)
    assert "days" in timed and "Cost" not in timed
    neither, _ = page_of(plan_of(), tmp_path)
    assert "days" not in neither and "Cost" not in neither


@pytest.mark.parametrize("gbit_per_s", [400, 0.001])
def test_labels_of_a_plan_stay_whole(gbit_per_s: float) -> None:
    plan = plan_of("layout.shard=16", f"cluster.inter={{gbit_per_s={gbit_per_s},ports=4}}")
    for width in (80, 100):
        lines = screen(plan, width)
        assert max(map(len, lines)) <= width
        for label in ("comm.shard", "the other buckets", "(shard, hidden)", "communication buffers", "fragmentation"):
            assert any(label in line for line in lines), label
        # Next to each other where both fit, else one below the other.
        together = any(line.startswith("step ") and line.endswith("of device") for line in lines)
        assert together == (width == 100 and gbit_per_s == 400)


def test_long_times_are_days() -> None:
    assert seconds_text(1_294_838.0) == "15 days"
    assert seconds_text(1e9) == "11,574 days"
    assert seconds_text(38_852.0) == "38,852 s"
    assert seconds_text(999.7) == "1,000 s"
