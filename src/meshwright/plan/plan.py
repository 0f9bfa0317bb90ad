"""Predictions, and the plan that is made of them."""

from collections.abc import Iterable, Sequence
from functools import partial

import msgspec

from meshwright.account import MemoryAccount
from meshwright.plan.compute import has_known_peak
from meshwright.plan.cost import Costs, predict_costs
from meshwright.plan.curve import Curve, build_curve
from meshwright.plan.fit import Rejected
from meshwright.plan.frame import Frame, build_frame
from meshwright.plan.interval import memory_interval, step_interval
from meshwright.plan.memory import predict_memories, predict_memory
from meshwright.plan.objective import Goal, check_fixed, check_goal, search_goal, weigh_by
from meshwright.plan.passes import walk_stages
from meshwright.plan.pipeline import draw_pipeline
from meshwright.plan.rehearsal import check_rehearsal, rehearsed_memories, with_rehearsal
from meshwright.plan.search import TIE, search_layouts
from meshwright.plan.smallest import largest_model, longest_sequence
from meshwright.plan.space import axes_in_use
from meshwright.plan.time import predict_step, share_machine
from meshwright.plan.uneven import Alone, explain_uneven, plan_alone
from meshwright.plan.verdict import explain_verdict
from meshwright.plan.weigh import Weigh, by_time
from meshwright.record import Prediction, Rehearsal
from meshwright.spec import Cluster, Job, Layout

# Layouts that a plan lists; the rest are counted.
LISTED = 10

PRECISION_NOTE = {
    "cuda": "constants measured on H200s, and held against published steps of A100s, H100s and GB200s",
    "rocm": "constants measured on NVIDIA's H200s, as shares of the datasheet: unproven on AMD's GPUs",
    "tpu": "constants measured on NVIDIA's H200s, as shares of the datasheet: unproven on TPUs and XLA",
    "cpu": (
        "constants measured on one 2-core virtual machine: expect the order of layouts, not the milliseconds; "
        "meshwright calibrate measures yours"
    ),
}
UNSTEADY_NOTE = "repeats lay far apart, so other programs ran too: calibrate again when the machine is idle"
UNKNOWN_PEAK_NOTE = "the device's peak is not known: memory is predicted, time is not"
EXPERTS_NOTE = (
    "mixtures of experts: products and the host's waits as in one small model's run; uneven loads are assumed, not "
    "measured (plan/rates.py, plan/expert.py)"
)
OFFLOAD_NOTE = "offloading: the host is assumed as fast as the one measured, and to have the memory (plan/rates.py)"
FP8_NOTE = (
    "fp8: the blocks' products reach as much less of the fp8 peak, casts included, as torchtitan's published steps "
    "say; the rest is as in bf16"
)
FP16_NOTE = "the device has no bf16: planned at its fp16 peak, for a trainer that has it"
EAGER_NOTE = "backward passes cut in two run without compiling: how much slower that is on a GPU is assumed"


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What planning found.

    verdict: whether one device is enough, in a sentence. job: the job's own layout as predicted; job_fits, whether
    it fits its device. one_device: the best layout of a single rank without offloading, None where none fits. ranked:
    best first, of `considered` that were predicted (no other can be among the first), and a good one with each axis
    that is not among them. capacity_bytes: of one device, for the job's own number of ranks. memories: of each of the
    job's ranks along pipeline. alone: where nodes are not alike, each kind without the others. costs: where there is a
    price, or a number of tokens to train on. goal: what was asked for; longest and largest plan for the sequence and
    the model that they found. curve: where it was asked for.
    """

    verdict: str
    model: str
    cluster: Cluster
    sequence: int
    global_batch: int
    capacity_bytes: float
    memories: tuple[MemoryAccount, ...]
    job: Prediction
    job_fits: bool
    one_device: Prediction | None
    ranked: tuple[Prediction, ...]
    considered: int
    rejected: tuple[Rejected, ...]
    alone: tuple[Alone, ...] = ()
    costs: Costs | None = None
    goal: Goal = Goal()
    curve: Curve | None = None


def predict(job: Job) -> Prediction:
    """The accounts of the job's own layout, and what its pipeline runs when."""
    job = share_machine(job)
    frame = build_frame(job)
    prediction = predict_framed(job, frame)
    if job.layout.pipeline == 1 or not has_known_peak(job.cluster.device, job):
        return prediction
    return msgspec.structs.replace(prediction, pipeline=draw_pipeline(job, frame, walk_stages(job, frame)))


def predict_framed(job: Job, frame: Frame, *, brief: bool = False) -> Prediction:
    """The same without what a pipeline runs when. frame: what build_frame gives for the job. brief: as predict_step."""
    job = share_machine(job)
    step, overlapped = predict_step(job, frame, brief=brief)
    memory, step_s = predict_memory(job, frame), step.total()
    tokens = job.data.global_batch * job.data.sequence
    return Prediction(
        layout=job.layout,
        step=step,
        overlapped=overlapped,
        memory=memory,
        step_s=step_s,
        step_interval_s=step_interval(job, step),
        memory_interval_bytes=memory_interval(job, memory),
        tokens_per_s=tokens / step_s if step_s else 0.0,
        notes=tuple(notes_on(job, known=step_s > 0)),
    )


def notes_on(job: Job, *, known: bool) -> list[str]:
    """How far to trust a prediction."""
    split = job.layout.schedule in ("zero-bubble", "zbv", "dualpipev") and job.cluster.device.is_accelerator
    notes = [precision_note(job.cluster) if known else UNKNOWN_PEAK_NOTE]
    notes += [FP8_NOTE] if job.layout.precision == "fp8" else []
    notes += [FP16_NOTE] if is_fp16(job) else []
    notes += [OFFLOAD_NOTE] if job.layout.offload != "none" else []
    return notes + ([EXPERTS_NOTE] if job.model.experts else []) + ([EAGER_NOTE] if split else [])


def precision_note(cluster: Cluster) -> str:
    """Where the constants of a prediction come from."""
    measured = cluster.measured
    if cluster.rates is None or measured is None:
        return PRECISION_NOTE[cluster.device.kind]
    together = f"{measured.processes} processes" if measured.processes > 1 else "one process"
    steady = "" if measured.is_steady else f"; {UNSTEADY_NOTE}"
    return f"constants calibrated on {measured.date} with {together} and PyTorch {measured.torch}{steady}"


def is_fp16(job: Job) -> bool:
    """Whether 16 bits are fp16's on the job's devices."""
    device = job.cluster.device
    return job.layout.plain_precision == "bf16" and 0 == device.peak_bf16_flops_per_s < device.peak_fp16_flops_per_s


def build_plan(job: Job, goal: Goal | None = None, *, rehearsal: Rehearsal | None = None) -> Plan:
    """Predict the job's layout, rank the others beside it, and say first whether one device is enough.

    rehearsal: of a rank of the job's own layout, whose figures take the place of the predicted ones. Raises
    SettingError where it is of another job, for a goal that cannot be meant, and where what it fixes leaves no layout.
    """
    goal = goal or Goal()
    check_goal(goal)
    check_fixed(job, goal.fixed)
    job = stretch(job, goal)
    if rehearsal is not None:
        check_rehearsal(job, rehearsal)
    brief = partial(predict_framed, brief=True)
    found, rejected = search_goal(job, brief, goal)
    own = predict(job)
    if rehearsal is not None:
        own = with_rehearsal(job, own, rehearsal)
        found = [own if one.layout == own.layout else one for one in found]
    ranked = rank_predictions(found, weigh_by(goal))
    offload = goal.fixed.get("offload", "none")
    one = next((p for p in ranked if p.layout.world_size == 1 and p.layout.offload == offload), None)
    shared = share_machine(job)
    capacity_bytes = shared.cluster.device.memory_bytes
    alone = plan_alone(job, best_layout)
    memories = predict_memories(shared, build_frame(shared))
    if rehearsal is not None:
        memories = rehearsed_memories(memories, job, rehearsal)
    uneven = explain_uneven(job, ranked[0] if ranked else None, alone)
    return Plan(
        verdict=f"{explain_verdict(job, own, one, ranked, goal)} {uneven}".rstrip(),
        model=job.model.name,
        cluster=job.cluster,
        sequence=job.data.sequence,
        global_batch=job.data.global_batch,
        capacity_bytes=capacity_bytes,
        memories=memories,
        job=own,
        job_fits=own.memory.total() <= capacity_bytes,
        one_device=one,
        ranked=tuple(
            rank_predictions((own if one is own else in_full(job, one) for one in list_of(ranked)), weigh_by(goal))
        ),
        considered=len(ranked),
        rejected=name_nearest(rejected, ranked),
        alone=alone,
        costs=predict_costs(job, own, ranked, None if goal.tokens is None else int(goal.tokens)),
        goal=goal,
        curve=build_curve(job, brief, goal) if goal.curve else None,
    )


def stretch(job: Job, goal: Goal) -> Job:
    """The job with the longest sequence or the largest model that some layout holds, where that is the goal."""
    if goal.objective == "longest" and (sequence := longest_sequence(job, goal.fixed)):
        return msgspec.structs.replace(job, data=msgspec.structs.replace(job.data, sequence=sequence))
    if goal.objective == "largest" and (model := largest_model(job, goal.fixed)):
        return msgspec.structs.replace(job, model=model)
    return job


def best_layout(job: Job) -> Prediction | None:
    """The first in rank of the layouts that fit, whatever the job's own is; None where none does."""
    found, _ = search_layouts(job, partial(predict_framed, brief=True))
    return in_full(job, rank_predictions(found)[0]) if found else None


def list_of(ranked: Sequence[Prediction]) -> list[Prediction]:
    """The fastest, and of each axis that divides models or sequences the fastest with it, however far behind."""
    axes = ("pipeline", "context", "tensor", "expert")
    firsts = [next((p for p in ranked if getattr(p.layout, axis) > 1), None) for axis in axes]
    return [p for place, p in enumerate(ranked) if place < LISTED or any(p is first for first in firsts)]


def in_full(job: Job, prediction: Prediction) -> Prediction:
    """A prediction that the search made in brief, with what its pipeline waits for told apart."""
    if prediction.layout.pipeline == 1 or not prediction.step_s:
        return prediction
    job = msgspec.structs.replace(job, layout=prediction.layout)
    return predict_framed(job, build_frame(job))


def rank_predictions(predictions: Iterable[Prediction], weigh: Weigh = by_time) -> list[Prediction]:
    """Best first; within TIE of the best that is left, simplest first."""

    def value(prediction: Prediction) -> float:
        return weigh(prediction.step_s, prediction.layout.world_size)

    left = sorted(predictions, key=value)
    ranked: list[Prediction] = []
    while left:
        ties = [p for p in left if value(p) <= value(left[0]) * (1 + TIE)]
        ranked += sorted(ties, key=complexity)
        left = left[len(ties) :]
    return ranked


def complexity(prediction: Prediction) -> tuple[float, ...]:
    """What makes a layout the harder one to run: ranks, axes in use, what is recomputed or offloaded, then memory."""
    layout = prediction.layout
    again = layout.recompute not in ("none", 0)
    turns = layout.pipeline > 1 and layout.schedule != "1f1b"
    away = layout.offload != "none"
    return (layout.world_size, axes_in_use(layout) + again + turns + away, prediction.memory.total())


def name_nearest(rejected: Sequence[Rejected], ranked: Sequence[Prediction]) -> tuple[Rejected, ...]:
    """Memory rejections with the nearest layout that works: as many ranks first, then as large a microbatch."""
    by_ranks: dict[int, list[Prediction]] = {}
    for prediction in ranked:
        by_ranks.setdefault(prediction.layout.world_size, []).append(prediction)

    def nearest(wanted: Layout) -> str:
        def distance(prediction: Prediction) -> tuple[float, ...]:
            layout = prediction.layout
            return (
                abs(layout.microbatch - wanted.microbatch),
                layout.pipeline != wanted.pipeline,
                layout.context != wanted.context,
                layout.tensor != wanted.tensor,
                layout.shard != wanted.shard,
                abs(layout.zero - wanted.zero),
                prediction.step_s,
            )

        ranks = min(by_ranks, key=lambda ranks: (abs(ranks - wanted.world_size), ranks))
        return min(by_ranks[ranks], key=distance).layout.label()

    return tuple(
        r if r.nearest or not ranked else msgspec.structs.replace(r, nearest=nearest(r.layout)) for r in rejected
    )
