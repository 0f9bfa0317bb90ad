"""What is wanted of a plan, from what the user typed."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast, get_args

from meshwright.spec.errors import SettingError, closest

if TYPE_CHECKING:
    from meshwright.plan import Goal

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
