"""What ranks along pipeline wait for: the schedule itself, stages that the layout made unequal, and ranks too slow."""

from collections.abc import Sequence
from statistics import fmean, median_low

import msgspec

from meshwright.account import Purpose, ResolvedStep, StepAccount
from meshwright.account.waits import TICK_S
from meshwright.plan.replay import KINDS, Seconds, Timetable, build_timetable, replay
from meshwright.spec import DURATIONS, Job, Layout, stage_blocks, stage_costs

# At these a rank of a pipeline waits even where all are equally fast: for a state, and at the step's end.
WAITS_IN_TURN: tuple[Purpose, ...] = ("pipeline", "control")


class Idle(msgspec.Struct, frozen=True, kw_only=True):
    """By rank along pipeline, as shares of the mean rank's busy time.

    bubble: idle with equal stages; imbalance: what unequal ones add; busy: how long the rank's own passes take.
    """

    bubble: tuple[float, ...]
    imbalance: tuple[float, ...]
    busy: tuple[float, ...]


def predict_idle(job: Job) -> Idle:
    """The schedule replayed with free messages: first with equal stages, then with stages as long as their FLOPs."""
    layout, stages = job.layout, stage_seconds(job)
    microbatches = layout.accumulation(job.data.global_batch)
    # All of the step, for the busy time is summed over it.
    timetable = build_timetable(layout, microbatches, rounds=microbatches)
    mean_stage = [fmean(kind) for kind in zip(*stages, strict=True)]
    equal = idle_seconds(layout, timetable, [mean_stage] * len(stages))
    unequal = idle_seconds(layout, timetable, stages)
    mean = fmean(busy for _, busy in equal)
    return Idle(
        bubble=tuple(idle / mean for idle, _ in equal),
        imbalance=tuple(max(0.0, more - less) / mean for (more, _), (less, _) in zip(unequal, equal, strict=True)),
        busy=tuple(busy / mean for _, busy in unequal),
    )


def stage_seconds(job: Job) -> list[Seconds]:
    """How long each stage's passes take, first to last, in seconds of a device of one FLOP/s.

    What is computed again is computed in the backward pass, or in its first half, of the stages that have such blocks.
    """
    costs = stage_sums(job, job.layout)
    once = stage_sums(job, msgspec.structs.replace(job.layout, recompute="none"))
    whole = DURATIONS["F"] + DURATIONS["B"]
    seconds: list[Seconds] = []
    for cost, cost_once in zip(costs, once, strict=True):
        forward, again = cost_once / whole, cost - cost_once
        passes: dict[str, float] = {kind: forward * DURATIONS[kind] for kind in DURATIONS}
        seconds.append([passes[kind[-1]] + (again if kind[-1] in ("B", "I") else 0.0) for kind in KINDS])
    return seconds


def stage_sums(job: Job, layout: Layout) -> list[float]:
    """What each of the job's stages costs under a layout, first to last."""
    blocks, first, last = stage_costs(job.model, layout, job.data.sequence)
    stages = stage_blocks(job.model, job.layout, job.data.sequence)
    costs = [sum(blocks[stage.start : stage.stop]) for stage in stages]
    costs[0] += first
    costs[-1] += last
    return costs


def idle_seconds(layout: Layout, timetable: Timetable, seconds: Sequence[Seconds]) -> list[tuple[float, float]]:
    """Idle and busy time of each rank along pipeline, until the last one is done; seconds: of each stage's passes."""
    end_s = replay(layout, timetable, seconds, hops=[0.0] * len(seconds)).finish_s
    busy = [sum(seconds[stage][kind] for stage, _, kind in steps) for steps in timetable.steps]
    return [(end_s - own, own) for own in busy]


def account_pipeline(resolved: Sequence[ResolvedStep], job: Job) -> list[ResolvedStep]:
    """One step of all ranks, with what each waited in turn divided over `bubble`, `imbalance` and `straggler`.

    The first two are what the replay gives at the ranks' usual pace, no more than was waited; what is left is blamed on
    the ranks that were busier than their stages' cost explains.
    """
    idle = predict_idle(job)
    places = {one.rank: job.layout.coordinates(one.rank)["pipeline"] for one in resolved}
    busy = {one.rank: busy_seconds(one.account) for one in resolved}
    # Not the mean's, which a late rank slows down: its delay would pass for bubble.
    pace_s = median_low(busy[rank] / idle.busy[places[rank]] for rank in busy)
    excess = {rank: max(0.0, busy[rank] - pace_s * idle.busy[places[rank]]) for rank in busy}
    late = {rank: more / sum(excess.values()) for rank, more in excess.items() if more > TICK_S}
    found: list[ResolvedStep] = []
    for one in resolved:
        waited = sum(one.waited.get(purpose, 0.0) for purpose in WAITS_IN_TURN)
        bubble = min(waited, pace_s * idle.bubble[places[one.rank]])
        imbalance = min(waited - bubble, pace_s * idle.imbalance[places[one.rank]])
        rest = waited - bubble - imbalance
        blame = dict(one.blame)
        for rank, share in late.items():
            if rank != one.rank and rest > 0:
                blame[rank] = blame.get(rank, 0.0) + rest * share
        account = msgspec.structs.replace(
            one.account,
            straggler=one.account.straggler - bubble - imbalance,
            bubble=one.account.bubble + bubble,
            imbalance=one.account.imbalance + imbalance,
        )
        found.append(msgspec.structs.replace(one, account=account, blame=blame))
    return found


def account_unknown_pipeline(resolved: Sequence[ResolvedStep]) -> list[ResolvedStep]:
    """One step of all ranks of a pipeline whose schedule nobody recorded, so that it cannot be replayed.

    What the busiest rank was busier than another explains so much of the other's waiting: `imbalance`, whether its
    stage is larger or it is slower. The rest is `bubble`. Nobody is blamed.
    """
    busy = {one.rank: busy_seconds(one.account) for one in resolved}
    found: list[ResolvedStep] = []
    for one in resolved:
        waited = sum(one.waited.get(purpose, 0.0) for purpose in WAITS_IN_TURN)
        imbalance = min(waited, max(busy.values()) - busy[one.rank])
        account = msgspec.structs.replace(
            one.account,
            straggler=one.account.straggler - waited,
            imbalance=one.account.imbalance + imbalance,
            bubble=one.account.bubble + waited - imbalance,
        )
        found.append(msgspec.structs.replace(one, account=account))
    return found


def busy_seconds(account: StepAccount) -> float:
    """What a rank's passes take: the transfers that they wait for included, and work that it launches or reads late."""
    moved = (account.comm_shard, account.comm_tensor, account.comm_context, account.comm_expert)
    return account.compute + account.recompute + account.host + account.input + sum(moved)
