"""What is wanted of a plan, from what the user typed, and the plan or the comparison that comes of it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast, get_args

import click

from meshwright.spec.errors import SettingError, closest

if TYPE_CHECKING:
    from rich.console import Console

    from meshwright.plan import Goal
    from meshwright.spec import Job

MOST_TOKENS = 1e18


def read_goal(
    objective: str,
    tokens: float | None,
    deadline_hours: float | None,
    fixes: Sequence[str],
    *,
    curve: bool,
    noise_tokens: float | None,
) -> "Goal":
    """The goal of the options. Raises SettingError for what cannot be meant."""
    from meshwright.plan import Goal, Objective, check_goal

    known = get_args(Objective)
    if objective not in known:
        raise SettingError(f"--objective {objective}", "is none", f"--objective {closest(objective, known)}")
    if tokens is not None and not 1 <= tokens <= MOST_TOKENS:
        raise SettingError(f"--tokens {tokens:g}", f"must lie between 1 and {MOST_TOKENS:g}", "--tokens 1e12")
    goal = Goal(
        objective=cast(Objective, objective),
        tokens=None if tokens is None else int(tokens),
        deadline_hours=deadline_hours,
        fixed=read_fixed(fixes),
        curve=curve,
        noise_tokens=noise_tokens,
    )
    check_goal(goal)
    return goal


def read_fixed(fixes: Sequence[str]) -> dict[str, Any]:
    """Settings of the layout by their names, from texts like layout.tensor=8."""
    from meshwright.spec import Layout
    from meshwright.spec.convert import convert
    from meshwright.spec.decode import apply_setting, check_keys
    from meshwright.spec.layout import check_axes

    fixed: dict[str, Any] = {}
    for fix in fixes:
        key, equals, _ = fix.partition("=")
        if not equals or not key.strip():
            raise SettingError(f"--fix {fix}", "must look like layout.key=value", "--fix layout.tensor=8")
        table: dict[str, Any] = {}
        apply_setting(table, fix)
        if list(table) != ["layout"]:
            near = closest(key.strip().rpartition(".")[2], Layout.__struct_fields__)
            raise SettingError(
                f"--fix {key.strip()}", "only settings of the layout are chosen", f"--fix layout.{near}=..."
            )
        check_keys(table["layout"], Layout, "layout.")
        layout = convert(table["layout"], Layout, "layout")
        check_axes(layout)
        for name in table["layout"]:
            value = getattr(layout, name)
            if name in fixed and fixed[name] != value:
                both = f"--fix layout.{name}={fixed[name]} and layout.{name}={value}"
                raise SettingError(both, "contradict each other", f"--fix layout.{name}={value}")
            fixed[name] = value
    return fixed


class Pages(NamedTuple):
    """How a plan is shown, and what a rehearsal's file gives it."""

    as_json: bool
    html: Path | None
    rehearsed: Path | None


def show_plan(
    wanted: Callable[[str | None], "Job"],
    clusters: Sequence[str],
    goal: "Goal",
    console: Callable[[], "Console"],
    pages: Pages,
    *,
    whole: bool,
) -> None:
    """Plan for one cluster, or compare several, and print what comes of it.

    wanted: the job on a cluster, None for its own. whole: it says how many tokens it trains on in all.
    """
    from meshwright.plan import build_plan, decide, make_offer
    from meshwright.record import read_rehearsal
    from meshwright.report.plan import decision_json, decision_text, plan_json, plan_text

    if len(clusters) > 1:
        ones = {"--html": pages.html is not None, "--rehearsed": pages.rehearsed is not None, "--curve": goal.curve}
        for option, given in ones.items():
            if given:
                raise SettingError(option, "is of one cluster's plan", "one --cluster")
        if goal.objective in ("longest", "largest"):
            reason = "gives each cluster another job, and offers are compared by one"
            raise SettingError(f"--objective {goal.objective}", reason, "one --cluster, or --objective fastest")
        twice = next((name for name in clusters if clusters.count(name) > 1), None)
        if twice is not None:
            raise SettingError(f"--cluster {twice}", "is given twice", "each cluster once")
        jobs = {name: wanted(name) for name in clusters}
        if whole:
            goal = of_whole_run(goal, jobs[clusters[0]])
        offers = [make_offer(name, one, build_plan(one, goal), goal.tokens) for name, one in jobs.items()]
        decision = decide(offers, goal.deadline_hours)
        if pages.as_json:
            click.echo(decision_json(decision))
        else:
            decision_text(decision, console())
        return
    job = wanted(clusters[0] if clusters else None)
    if whole and job.cluster.price_per_device_hour is not None:
        goal = of_whole_run(goal, job)
    planned = build_plan(job, goal, rehearsal=None if pages.rehearsed is None else read_rehearsal(pages.rehearsed))
    if pages.html is not None:
        from meshwright.report.plan_page import write_plan

        try:
            write_plan(planned, pages.html)
        except OSError as error:
            reason = f"cannot be written ({error.strerror})"
            raise SettingError(f"--html {pages.html}", reason, "--html plan.html") from None
    if pages.as_json:
        click.echo(plan_json(planned))
    else:
        plan_text(planned, console())


def of_whole_run(goal: "Goal", job: "Job") -> "Goal":
    """The goal with the tokens that the job trains on, where nobody said how many."""
    import msgspec

    if goal.tokens is not None:
        return goal
    return msgspec.structs.replace(goal, tokens=job.run.steps * job.data.global_batch * job.data.sequence)
