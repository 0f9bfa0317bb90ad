"""A job made small enough to be verified in seconds: same family, same axes, same kind of split."""

from collections.abc import Callable
from math import prod
from pathlib import Path

import msgspec

from meshwright.spec import (
    AXES,
    CheckpointSettings,
    Cluster,
    DataSettings,
    EvaluationSettings,
    Job,
    Layout,
    ModelSpec,
    OptimizerSettings,
    RunSettings,
    TraceSettings,
    check_job,
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


def shrink_job(job: Job, folder: Path, *, local: Callable[[int], Cluster]) -> Job:
    """The job's model, layout and batch at their smallest that still splits in the same way, on this machine.

    Five steps of SGD in fp32, so that weights can be compared: Adam amplifies round-off.
    """
    layout = shrink_layout(job.layout, job.data.global_batch)
    cluster = local(layout.world_size)
    if cluster.device.kind != "cuda":
        layout = msgspec.structs.replace(layout, async_tensor=False)
    sequence = SEQUENCE * layout.tensor
    small = Job(
        run=RunSettings(name="layout", folder=str(folder), steps=STEPS, seed=job.run.seed),
        model=shrink_model(job.model, job.layout, layout, sequence),
        data=DataSettings(
            path=str(folder / "text"),
            cache=str(folder / "tokens"),
            sequence=sequence,
            global_batch=layout.data_size
            * layout.microbatch
            * min(job.layout.accumulation(job.data.global_batch), LARGEST_ACCUMULATION),
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


def shrink_layout(layout: Layout, global_batch: int) -> Layout:
    """The layout with its largest axes halved, none below 2, until it has few ranks."""
    sizes = {axis: layout.size(axis) for axis in AXES}
    while prod(sizes.values()) > LARGEST_WORLD and max(sizes.values()) > 2:
        largest = max(sizes, key=lambda axis: sizes[axis])
        sizes[largest] = max(2, sizes[largest] // 2)
    share = global_batch // layout.data_size
    microbatch = min(layout.microbatch, LARGEST_MICROBATCH)
    recompute = min(layout.recompute, 1) if isinstance(layout.recompute, int) else layout.recompute
    assert share >= 1
    return msgspec.structs.replace(layout, **sizes, microbatch=microbatch, recompute=recompute)


def shrink_model(model: ModelSpec, wide: Layout, layout: Layout, sequence: int) -> ModelSpec:
    """Two layers of small widths; heads and key heads stand to each other, and to tensor, as they did."""
    tensor = layout.tensor
    # Fewer key heads than ranks stay fewer, near their proportion, and each is shared by equally many ranks; enough of
    # them are two a rank, if there were as many.
    if model.kv_heads < wide.tensor:
        most = max(1, tensor * model.kv_heads // wide.tensor)
        kv_heads = max(number for number in range(1, most + 1) if tensor % number == 0)
    else:
        kv_heads = tensor * min(2, model.kv_heads // wide.tensor)
    group = min(2, model.heads // model.kv_heads)
    heads = max(tensor, kv_heads * group)
    scaling = model.rope_scaling
    if scaling is not None:
        scaling = msgspec.structs.replace(scaling, original_positions=sequence // 2)
    return msgspec.structs.replace(
        model,
        name="custom",
        layers=min(model.layers, 2),
        d_model=heads * HEAD_DIM,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=HEAD_DIM,
        # Odd multiples: parameter parts of unequal size.
        feed_forward=tensor * 45,
        vocabulary=VOCABULARY,
        path="",
        max_positions=sequence if model.max_positions else 0,
        rope_scaling=scaling,
        attention_window=sequence // 2 + 1 if model.attention_window else 0,
    )


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
