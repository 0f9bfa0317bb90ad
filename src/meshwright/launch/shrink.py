"""A job made small enough to be verified in seconds: same family, same axes, same kind of split."""

from collections.abc import Callable
from math import lcm, prod
from pathlib import Path

import msgspec

from meshwright.spec import (
    AXES,
    CheckpointSettings,
    Cluster,
    DataSettings,
    EvaluationSettings,
    Experts,
    Job,
    Layout,
    ModelSpec,
    OptimizerSettings,
    RunSettings,
    TraceSettings,
    check_job,
    stage_count,
)

# More processes than this show nothing that these do not.
LARGEST_WORLD = 8
STEPS = 5
SEQUENCE = 32
HEAD_DIM = 16
# Above the 257 byte tokens, and prime: it divides by no size of tensor.
VOCABULARY = 263
LARGEST_MICROBATCH = 2
LARGEST_ACCUMULATION = 4
# So that two a token, from one group of two, leave some out.
FEWEST_EXPERTS = 4


def shrink_job(job: Job, folder: Path, *, local: Callable[[int], Cluster]) -> Job:
    """The job's model, layout and batch at their smallest that still splits in the same way, on this machine.

    Five steps of SGD in fp32, so that weights can be compared: Adam amplifies round-off.
    """
    layout = shrink_layout(job.layout, job.data.global_batch)
    cluster = local(layout.world_size)
    if cluster.device.kind != "cuda":
        layout = msgspec.structs.replace(layout, async_tensor=False)
    if cluster.device.kind != "cuda" or layout.offload == "optimizer":
        layout = msgspec.structs.replace(layout, offload="none")
    # Two chunks for each rank along context, each of which tensor divides.
    part = 2 * layout.context * layout.tensor
    sequence = -(-SEQUENCE * layout.tensor // part) * part
    small = Job(
        run=RunSettings(name="layout", folder=str(folder), steps=STEPS, seed=job.run.seed),
        model=shrink_model(job.model, job.layout, layout, sequence),
        data=DataSettings(
            path=str(folder / "text"),
            cache=str(folder / "tokens"),
            sequence=sequence,
            global_batch=layout.data_size
            * layout.microbatch
            # A pipeline's schedules need microbatches, some of them two for each of its ranks.
            * min(job.layout.accumulation(job.data.global_batch), max(LARGEST_ACCUMULATION, 2 * layout.pipeline)),
            held_out=0.0,
            attention=job.data.attention,
        ),
        # A rate at which five steps change every weight, and a norm that clips.
        optimizer=OptimizerSettings(
            name="sgd",
            learning_rate=0.5,
            warmup_steps=2,
            weight_decay=0.01,
            clip_norm=0.5 if job.optimizer.clip_norm else 0.0,
        ),
        layout=layout,
        cluster=cluster,
        evaluation=EvaluationSettings(),
        checkpoint=CheckpointSettings(at_end=False),
        trace=TraceSettings(every_steps=0),
    )
    check_job(small)
    return small


def find_unverified(job: Job, small: Job) -> tuple[str, ...]:
    """Settings of the job's layout that its small form had to drop, each with why."""
    found: list[str] = []
    if job.layout.async_tensor and not small.layout.async_tensor:
        found.append("layout.async_tensor = true: it needs GPUs")
    if job.layout.offload != small.layout.offload:
        why = "it means nothing to SGD, which keeps no states" if job.layout.offload == "optimizer" else "it needs GPUs"
        found.append(f'layout.offload = "{job.layout.offload}": {why}')
    return tuple(found)


def shrink_layout(layout: Layout, global_batch: int) -> Layout:
    """The layout with its largest axes halved, none below 2, until it has few ranks."""
    sizes = {axis: layout.size(axis) for axis in AXES}
    while prod(sizes.values()) > LARGEST_WORLD and max(sizes.values()) > 2:
        largest = max(sizes, key=lambda axis: sizes[axis])
        sizes[largest] = max(2, sizes[largest] // 2)
    reused = sizes["shard"] * sizes["context"] * sizes["tensor"]
    expert = 1 if layout.expert == 1 else reused
    if layout.expert_shard > 1 and expert > 2 and reused % 2 == 0:
        # Some of its ranks divide the experts, the others each expert, as they did.
        expert = 2
    share = global_batch // layout.data_size
    microbatch = min(layout.microbatch, LARGEST_MICROBATCH)
    recompute = min(layout.recompute, 1) if isinstance(layout.recompute, int) else layout.recompute
    assert share >= 1
    # Unequal stages stay unequal.
    fewest = min(layout.stage_layers, default=0)
    uneven = tuple(1 if layers == fewest else 2 for layers in layout.stage_layers)
    small = msgspec.structs.replace(layout, **sizes, expert=expert, microbatch=microbatch, recompute=recompute)
    return msgspec.structs.replace(small, stage_layers=uneven[: stage_count(small)])


def shrink_model(model: ModelSpec, wide: Layout, layout: Layout, sequence: int) -> ModelSpec:
    """Two small layers, or one a stage; heads and key heads stand to each other, and to their ranks, as they did."""
    ranks, many = head_ranks(layout), head_ranks(wide)
    # Fewer key heads than ranks stay fewer, near their proportion, and each is shared by equally many ranks; enough of
    # them are two a rank, if there were as many.
    if model.kv_heads < many:
        most = max(1, ranks * model.kv_heads // many)
        kv_heads = max(number for number in range(1, most + 1) if ranks % number == 0)
    else:
        kv_heads = ranks * min(2, model.kv_heads // many)
    group = min(2, model.heads // model.kv_heads)
    heads = lcm(ranks, kv_heads * group)
    parts = layout.expert_shard
    scaling = model.rope_scaling
    if scaling is not None:
        scaling = msgspec.structs.replace(scaling, original_positions=sequence // 2)
    return msgspec.structs.replace(
        model,
        name="custom",
        layers=sum(layout.stage_layers) or min(model.layers, max(2, stage_count(layout))),
        # A multiple of the ranks that divide an expert.
        d_model=heads * HEAD_DIM if model.experts is None else -(-heads * HEAD_DIM // parts) * parts,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=HEAD_DIM,
        # Odd multiples: parameter parts of unequal size.
        feed_forward=layout.tensor * 45,
        vocabulary=VOCABULARY,
        path="",
        max_positions=sequence if model.max_positions else 0,
        rope_scaling=scaling,
        attention_window=sequence // 2 + 1 if model.attention_window else 0,
        experts=None if model.experts is None else shrink_experts(model.experts, wide, layout),
    )


def shrink_experts(experts: Experts, wide: Layout, layout: Layout) -> Experts:
    """A few narrow experts; one a rank where there was one, else two, and groups and dense layers where there were."""
    count = layout.expert * min(2, experts.count // wide.expert)
    while count < FEWEST_EXPERTS:
        count *= 2
    grouped = experts.groups > 1
    return msgspec.structs.replace(
        experts,
        count=count,
        per_token=min(experts.per_token, 2),
        feed_forward=layout.expert_shard * 15,
        shared=min(experts.shared, 2),
        dense_layers=min(experts.dense_layers, 1),
        groups=2 if grouped else 1,
        groups_per_token=1 if experts.groups_per_token < experts.groups or not grouped else 2,
    )


def head_ranks(layout: Layout) -> int:
    """Ranks that a model's heads are divided over."""
    return layout.tensor * (layout.context if layout.context_form == "all-to-all" else 1)


def write_text(folder: Path) -> None:
    """A text of many short documents for the shrunk job, the same in every verification.

    Prompts with completions, so that what counts differs from sample to sample: a loss that is a mean of means shows.
    """
    text = folder / "text"
    text.mkdir(parents=True)
    lines: list[bytes] = []
    for number in range(200):
        words = [f"word{(number * 7 + i * i) % 97}" for i in range(5 + number * 13 % 60)]
        third = len(words) // 3
        line = {"prompt": " ".join(words[:third]) + " ", "completion": " ".join(words[third:])}
        lines.append(msgspec.json.encode(line))
    (text / "text.jsonl").write_bytes(b"\n".join(lines) + b"\n")
