"""Does the search find what predicting every layout finds? Random small jobs on random clusters, both ways.

    python benchmarks/search_check.py [--cases 50] [--seed 0]

Everything is enumerated in plain loops, each layout is predicted on its own, and nothing is skipped for being slow. A
case passes where the ten best steps (or costs) are the same to nine figures. Exit code 1 where one does not.
"""

import argparse
import random
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import product

import msgspec

from meshwright.plan.fit import HOST_BYTES_PER_DEVICE, SPARE
from meshwright.plan.frame import build_frame
from meshwright.plan.plan import predict_framed
from meshwright.plan.search import MOST, search_layouts
from meshwright.plan.space import (
    LARGEST_DIVIDED_MICROBATCH,
    LARGEST_MICROBATCH,
    LONGEST_PIPELINE,
    OUTERMOST,
    SCHEDULES,
    SHORTEST_PIECE,
    axis_sizes,
)
from meshwright.plan.time import share_machine
from meshwright.plan.weigh import Weigh, by_cost, by_time
from meshwright.record import Prediction
from meshwright.spec import (
    Cluster,
    DataSettings,
    Experts,
    Job,
    Layout,
    Link,
    ModelSpec,
    RunSettings,
    SettingError,
    check_job,
)
from meshwright.spec.hardware import cluster_of


def random_job(seed: int) -> Job:
    """A job small enough to enumerate, on devices with so much memory that some layouts fit and others do not."""
    draw = random.Random(seed)
    heads = draw.choice((4, 8, 12))
    model = ModelSpec(
        layers=draw.choice((2, 4, 6)),
        d_model=heads * 128,
        heads=heads,
        kv_heads=draw.choice([n for n in (1, 2, 4) if heads % n == 0]),
        head_dim=128,
        feed_forward=heads * 384,
        vocabulary=draw.choice((4096, 32768)),
    )
    if draw.random() < 0.2:
        experts = Experts(count=4, per_token=2, feed_forward=heads * 128)
        model = msgspec.structs.replace(model, family="mixtral", experts=experts)
    base = cluster_of(draw.choice(("8xh100", "8xa100-80", "8xh200")))
    sizes = ((1, 2), (1, 4), (2, 2), (1, 8), (2, 4))
    # A mixture has as many layouts once more for each size of expert.
    nodes, per_node = draw.choice(sizes[:3] if model.experts else sizes)
    device = msgspec.structs.replace(base.device, memory_bytes=draw.uniform(3.5e9, 12e9))
    speed = 10 ** draw.uniform(9.5, 11)
    inter = Link(name="network", bytes_per_s=speed, latency_s=draw.choice((5e-6, 5e-5)), source="drawn")
    sequence, batch, intra = draw.choice((2048, 8192)), draw.choice((4, 8)), base.intra
    if draw.random() < 0.3:
        # Of which more devices can be slower than fewer.
        intra = msgspec.structs.replace(intra, bytes_per_s=10 ** draw.uniform(9.0, 11.0))
        batch = draw.choice((1, 2, 4))
    cluster = Cluster(device=device, nodes=nodes, devices_per_node=per_node, intra=intra, inter=inter)
    return Job(
        run=RunSettings(name="case", steps=1),
        model=model,
        data=DataSettings(sequence=sequence, global_batch=batch),
        layout=Layout(),
        cluster=cluster,
    )


def every_layout(job: Job) -> Iterator[Layout]:
    """All of docs/planning.md's list, legal or not, but for recompute and offload."""
    cluster, batch = job.cluster, job.data.global_batch
    sizes = axis_sizes(cluster.devices)
    experts = [1, 2, 4] if job.model.experts else [1]
    for ranks, tensor, pipeline, context in product(sizes, axis_sizes(cluster.devices_per_node), sizes, sizes):
        inner = tensor * pipeline * context
        if ranks % inner or pipeline > min(LONGEST_PIPELINE, job.model.layers):
            continue
        if context > 1 and job.data.sequence < SHORTEST_PIECE * context * tensor:
            continue
        data = ranks // inner
        if batch % data:
            continue
        divided = pipeline * context > 1
        most = min(batch // data // pipeline, LARGEST_DIVIDED_MICROBATCH if divided else LARGEST_MICROBATCH)
        for shard, form, (schedule, held), microbatch, zero, expert in product(
            shards(cluster, data, context * tensor, divided=divided),
            ("ring", "all-to-all") if context > 1 else ("ring",),
            SCHEDULES if pipeline > 1 else SCHEDULES[:1],
            range(1, most + 1),
            (3, 2, 1),
            experts,
        ):
            layout = Layout(
                pipeline=pipeline,
                replica=data // shard,
                shard=shard,
                context=context,
                tensor=tensor,
                expert=expert,
                microbatch=microbatch,
                zero=zero,
                schedule=schedule,
                stages_per_rank=held,
                context_form=form,
            )
            alone = layout.parameter_shards == 1 and not (job.model.experts and layout.expert_shard > 1)
            if alone and zero < 3:
                continue
            yield from every_order(layout, cluster)


def shards(cluster: Cluster, data: int, beside: int, *, divided: bool) -> list[int]:
    """Ways to share `data` ranks' parameters: any, or beside pipelines and divided sequences three of them."""
    if not divided:
        return [size for size in range(1, data + 1) if data % size == 0]
    inside = [n for n in range(1, data + 1) if data % n == 0 and cluster.devices_per_node // beside % n == 0]
    return sorted({1, data, max(inside, default=1)})


def every_order(layout: Layout, cluster: Cluster) -> Iterator[Layout]:
    """Each axis but tensor as the outermost."""
    yield layout
    if cluster.nodes > 1 and layout.world_size > cluster.devices_per_node:
        for axis in OUTERMOST:
            if layout.size(axis) > 1 and axis != layout.order[0]:
                order = (axis, *(other for other in layout.order if other != axis))
                yield msgspec.structs.replace(layout, order=order)


def predicted(job: Job, layout: Layout) -> Prediction | None:
    """The layout by itself; None where it is not legal."""
    job = msgspec.structs.replace(job, layout=layout)
    try:
        check_job(job)
    except SettingError:
        return None
    return predict_framed(job, build_frame(job), brief=True)


def with_what_fits(job: Job, layout: Layout) -> Iterator[Prediction]:
    """The layout with nothing recomputed; where that does not fit, with each way of giving up as little as must be."""
    room = (1 - SPARE) * share_machine(job).cluster.device.memory_bytes
    plain = predicted(job, layout)
    if plain is None:
        return
    for offload in ("none",) if layout.pipeline > 1 else ("none", "optimizer", "parameters"):
        candidate = msgspec.structs.replace(layout, offload=offload)
        whole = predicted(job, candidate)
        if whole is None or not host_holds(whole, plain, offload):
            continue
        if whole.memory.total() <= room:
            yield whole
            return
        kinds = ("selective", *range(1, job.model.layers), "full")
        tried = {kind: predicted(job, msgspec.structs.replace(candidate, recompute=kind)) for kind in kinds}
        full = tried["full"]
        if full is None or full.memory.total() > room:
            continue
        selective = tried["selective"]
        if selective is not None and selective.memory.total() <= room:
            yield selective
        enough = (tried[n] for n in range(1, job.model.layers))
        yield next((one for one in enough if one is not None and one.memory.total() <= room), full)


def host_holds(whole: Prediction, plain: Prediction, offload: str) -> bool:
    """Whether what went to the host has room there."""
    states = [sum((p.memory.parameters, p.memory.gradients, p.memory.optimizer_states)) for p in (plain, whole)]
    return offload == "none" or states[0] - states[1] <= HOST_BYTES_PER_DEVICE


def best_of_all(job: Job, *, cost: bool) -> list[tuple[float, Layout]]:
    """The ten best of everything."""
    weigh = by_cost if cost else by_time
    return ten_best((one for layout in every_layout(job) for one in with_what_fits(job, layout)), weigh)


def best_of_search(job: Job, *, cost: bool) -> list[tuple[float, Layout]]:
    """The ten best of the search."""
    weigh = by_cost if cost else by_time
    found, _ = search_layouts(job, partial(predict_framed, brief=True), weigh=weigh)
    return ten_best(found, weigh)


def ten_best(predictions: Iterable[Prediction], weigh: Weigh) -> list[tuple[float, Layout]]:
    """The ten best of them, each once for all its orders that are as fast."""
    found: dict[tuple[object, ...], tuple[float, Layout]] = {}
    for one in predictions:
        key = (msgspec.structs.replace(one.layout, order=Layout().order), round(one.step_s, 12))
        found.setdefault(key, (weigh(one.step_s, one.layout.world_size), one.layout))
    return sorted(found.values(), key=lambda pair: pair[0])[:MOST]


def check_case(seed: int) -> tuple[str, bool]:
    """One case in a line, and whether both ways find the same."""
    job, cost = random_job(seed), seed % 3 == 2
    begun = time.process_time()
    every = best_of_all(job, cost=cost)
    between = time.process_time()
    found = best_of_search(job, cost=cost)
    ended = time.process_time()
    same = len(every) == len(found) and all(
        abs(one - two) <= 1e-9 * one for (one, _), (two, _) in zip(every, found, strict=True)
    )
    speed = f"{between - begun:6.2f} s against {ended - between:5.2f} s"
    what = f"case {seed:3}: {len(every):2} of {job.cluster.label():22} {'cost' if cost else 'time'} {speed}"
    if same:
        return f"{what}  same", True
    lines = [f"{what}  NOT the same"]
    for place in range(max(len(every), len(found))):
        both = [
            f"{side[place][0]:.6g} {side[place][1].label()}" if place < len(side) else "-" for side in (every, found)
        ]
        lines.append(f"    {both[0]:100} | {both[1]}")
    return "\n".join(lines), False


def main() -> int:
    """Check as many cases as asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    passed = 0
    for seed in range(arguments.seed, arguments.seed + arguments.cases):
        line, same = check_case(seed)
        passed += same
        print(line, flush=True)
    print(f"{passed} of {arguments.cases} cases the same")
    return 0 if passed == arguments.cases else 1


if __name__ == "__main__":
    sys.exit(main())
