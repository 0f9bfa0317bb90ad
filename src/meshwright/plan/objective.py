"""What a plan is to be best at, and the search for it."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import msgspec

from meshwright.plan.compute import has_known_peak
from meshwright.plan.cost import HOUR_S
from meshwright.plan.fit import Rejected, with_layout
from meshwright.plan.search import Predict, search_layouts
from meshwright.plan.shared import Shared
from meshwright.plan.smallest import fewest_ranks, is_divisible
from meshwright.plan.space import Space
from meshwright.plan.weigh import Weigh, by_cost, by_time
from meshwright.record import Prediction
from meshwright.spec import Job, Layout, SettingError, check_layout, check_offload, check_precision, check_split

# fastest: the shortest step. cheapest: the least of a device's time for a token, and so of money where it has a price.
# fewest: the fewest devices that train on `tokens` within the deadline. longest, largest: the longest sequence and the
# largest model of its shape that the cluster holds, planned to be fast.
Objective = Literal["fastest", "cheapest", "fewest", "longest", "largest"]


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    """What is wanted of a plan.

    tokens: to train on in all. deadline_hours: for all of them. fixed: settings of the layout that are not to be
    chosen, by their names. curve: whether other numbers of devices are asked about. noise_tokens: the gradient noise
    scale, in tokens.
    """

    objective: Objective = "fastest"
    tokens: int | None = None
    deadline_hours: float | None = None
    fixed: dict[str, Any] = {}
    curve: bool = False
    noise_tokens: float | None = None

    def step_limit_s(self, job: Job) -> float | None:
        """Seconds that a step may take; None without a deadline."""
        if self.tokens is None or self.deadline_hours is None:
            return None
        steps = self.tokens / (job.data.global_batch * job.data.sequence)
        return self.deadline_hours * HOUR_S / steps


def check_goal(goal: Goal) -> None:
    """Raise SettingError for a goal that lacks what it needs, or has what it would not look at."""
    if goal.objective not in get_args(Objective):
        raise SettingError(f"--objective {goal.objective}", "is none", f"--objective {'|'.join(get_args(Objective))}")
    for option, value in (("--tokens", goal.tokens), ("--deadline-hours", goal.deadline_hours)):
        if value is not None and not 0 < value < float("inf"):
            near = "720" if option == "--deadline-hours" else "1e12"
            raise SettingError(f"{option} {value:g}", "must be a number above 0", f"{option} {near}")
    if goal.objective == "fewest" and (goal.tokens is None or goal.deadline_hours is None):
        reason = "needs a number of tokens and a deadline"
        raise SettingError("--objective fewest", reason, "--tokens 1e12 --deadline-hours 720")
    if goal.deadline_hours is not None and goal.objective != "fewest":
        reason = f"is for --objective fewest, and this is {goal.objective}"
        raise SettingError("--deadline-hours", reason, "--objective fewest")
    if goal.noise_tokens is not None:
        if not 0 < goal.noise_tokens < float("inf"):
            raise SettingError(
                f"--noise-tokens {goal.noise_tokens:g}", "must be a number above 0", "--noise-tokens 1e6"
            )
        if not goal.curve:
            raise SettingError("--noise-tokens", "is for the scaling curve", "--curve --noise-tokens 1e6")


def check_fixed(job: Job, fixed: Mapping[str, Any]) -> None:
    """Raise SettingError for a value that no layout of the job could have, however its ranks are divided."""
    alone: dict[str, Any] = {"zero": 3 if job.trainer.gathers else 1, "precision": job.layout.precision}
    alone |= {name: fixed[name] for name in ("microbatch", "recompute", "precision", "offload") if name in fixed}
    job = with_layout(job, Layout(**alone))
    check_layout(job.layout, job.data.global_batch)
    check_split(job.layout, job.model, job.data.sequence)
    check_precision(job)
    check_offload(job)


def weigh_by(goal: Goal) -> Weigh:
    """What the goal judges layouts by."""
    return by_cost if goal.objective == "cheapest" else by_time


def search_goal(job: Job, predict: Predict, goal: Goal) -> tuple[list[Prediction], list[Rejected]]:
    """The best layouts for the goal, the best of one device and of the fewest that work, and what does not fit."""
    shared = Shared(job, known=has_known_peak(job.cluster.device, with_layout(job, Space(job, goal.fixed).base)))
    if goal.objective == "fewest":
        found, rejected = search_deadline(job, predict, goal, shared)
    else:
        found, rejected = search_layouts(job, predict, fixed=goal.fixed, weigh=weigh_by(goal), shared=shared)
    # These are spoken of, however slow they are.
    unmoved = {"offload": "none", **goal.fixed}
    fewest = fewest_ranks(job, unmoved)
    # Beside fewer that are fast enough they would only be faster, which is not the goal.
    limit_s = goal.step_limit_s(job) if goal.objective == "fewest" else None
    enough = [p.layout.world_size for p in found if limit_s is not None and 0 < p.step_s <= limit_s]
    spoken = any(p.layout.world_size == fewest and p.layout.offload == unmoved["offload"] for p in found)
    if fewest is not None and not spoken and all(ranks > fewest for ranks in enough):
        more, refused = search_layouts(job, predict, fixed=unmoved, ranks=[fewest], most=1, shared=shared)
        found, rejected = [*found, *more], [*rejected, *refused]
    if job.cluster.price_per_device_hour is not None and goal.objective != "cheapest":
        # So that what is called the cheapest is: where the fewest are enough, of as many, for more would be faster.
        ranks = sorted(set(enough)) or None
        cheapest, _ = search_layouts(job, predict, fixed=goal.fixed, ranks=ranks, weigh=by_cost, most=1, shared=shared)
        known = {one.layout for one in found}
        found = [*found, *(one for one in cheapest if one.layout not in known)]
    if not found and not any(one.memory is not None for one in rejected) and not is_divisible(job, goal.fixed):
        refuse_fixed(goal, rejected)
    return found, rejected


def search_deadline(job: Job, predict: Predict, goal: Goal, shared: Shared) -> tuple[list[Prediction], list[Rejected]]:
    """The best layouts of the fewest ranks that are fast enough; where none are, the fastest."""
    limit_s, refused = goal.step_limit_s(job), list[Rejected]()
    assert limit_s is not None
    space = Space(job, goal.fixed)
    for ranks in space.ranks():
        found, rejected = search_layouts(job, predict, fixed=goal.fixed, ranks=[ranks], shared=shared)
        refused += rejected
        in_time = [one for one in found if 0 < one.step_s <= limit_s]
        if in_time:
            return in_time, refused
    return search_layouts(job, predict, fixed=goal.fixed, shared=shared)


def refuse_fixed(goal: Goal, rejected: Sequence[Rejected]) -> None:
    """Raise SettingError where what is fixed leaves no layout that could run, whatever fits."""
    if not goal.fixed:
        return
    given = " ".join(f"--fix layout.{name}={value}" for name, value in goal.fixed.items())
    if not rejected:
        sizes = " and ".join(f"layout.{name}" for name in goal.fixed)
        raise SettingError(given, "leave no layout that the devices and the batch can be divided by", f"other {sizes}")
    nearest = next((one for one in rejected if one.nearest), rejected[0])
    raise SettingError(given, f"leave no layout: {nearest.reason}", nearest.nearest)
