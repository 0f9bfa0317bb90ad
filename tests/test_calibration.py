"""From figures to rates: a machine that keeps exactly to the plan's model gives its own rates back."""

from collections.abc import Sequence
from random import Random
from typing import Any

import msgspec
import pytest

from meshwright.plan import predict
from meshwright.plan.calibration import calibrate_cluster, job_of, model_of
from meshwright.plan.collective import hop_seconds, place_ring, predict_collective, predict_exchange
from meshwright.plan.compute import attention_seconds, block_passes, head_passes, predict_optimizer, product_seconds
from meshwright.plan.fitting import fit_line
from meshwright.plan.part import cut_model
from meshwright.plan.rates import rates_of
from meshwright.record.calibration import Calibration, Figure, Place
from meshwright.spec import MESHWRIGHT, Cluster, Collective, Layout, Rates
from meshwright.spec.cluster import check_cluster
from meshwright.spec.hardware import cluster_of, unknown_gpu

RANKS = 8
SIZES = (1 << 16, 1 << 20, 1 << 24, 1 << 28)


def other_machine() -> Cluster:
    """A node whose rates are none of the built-in ones."""
    cluster = cluster_of(f"{RANKS}xh100")
    rates = msgspec.structs.replace(
        rates_of(cluster),
        matmul=0.61,
        matmul_edge=140.0,
        attention={"cudnn": (0.44, 0.31), "flash": (0.29, 0.2), "flash-1": (0.29 * 20 / 32, 0.2 * 15 / 22)},
        elementwise=0.47,
        eager=0.66,
        loss=0.71,
        update=0.64,
        links={"all_reduce": 0.5, "all_gather": 0.6, "reduce_scatter": 0.55, "all_to_all": 0.4, "send": 0.3},
        contention=0.3,
        block_host_s=0.5e-3,
        eager_host_s=2e-3,
        group_host_s=0.4e-3,
        host_link_bytes_per_s=21e9,
        host_update_bytes_per_s=8e9,
    )
    intra = msgspec.structs.replace(cluster.intra, latency_s=7e-6)
    return msgspec.structs.replace(cluster, rates=rates, intra=intra)


def figures_of(machine: Cluster) -> Calibration:
    """What would be measured on it."""
    rates = rates_of(machine)
    figures: list[Figure] = []

    def add(work: str, sizes: tuple[int, ...], seconds: float, **more: object) -> None:
        figure = Figure(work=work, sizes=sizes, seconds=seconds, spread=0.03, repeats=25)
        figures.append(msgspec.structs.replace(figure, **more))

    for rows, inner, columns in ((8192, 4096, 4096), (8192, 4096, 14336), (2048, 1024, 4096), (1024, 1024, 1024)):
        job = job_of(machine, model_of(inner, 1, 1, inner), 1, rows)
        add("product", (rows, inner, columns), product_seconds(job, (columns, inner)))
    add("product.fp32", (4096, 4096, 4096), 2 * 4096**3 / 50e12)
    for name, kernel in (("attention", "cudnn"), ("attention.flash", "flash")):
        trainer = msgspec.structs.replace(MESHWRIGHT, attention=kernel)
        job = job_of(machine, model_of(4096, 32, 32, 128), 2, 4096, trainer=trainer)
        forward, backward = attention_seconds(job, cut_model(job))
        add(f"{name}.forward", (2, 32, 4096, 128), forward)
        add(f"{name}.both", (2, 32, 4096, 128), forward + backward)
    for name, compiled in (("block.compiled", True), ("block.eager", False)):
        trainer = msgspec.structs.replace(MESHWRIGHT, compiled=compiled)
        job = job_of(machine, model_of(4096, 32, 8, 128, feed_forward=14336), 2, 4096, trainer=trainer)
        cut = cut_model(job)
        passes = block_passes(job, cut, cut.others)
        add(name, (4096, 32, 8, 128, 14336, 2, 4096), passes.forward_s + passes.backward_s)
    head = head_passes(job_of(machine, model_of(64, 1, 1, 64, vocabulary=32768), 1, 8192))
    add("loss", (8192, 32768), head.forward_s + head.backward_s - 3 * head.weights_s)
    bandwidth = machine.device.memory_bytes_per_s
    add("scores", (1, 32, 2048, 128), 4 * 32 * 2048**2 * 128 / (rates.scores * machine.device.peak_flops_per_s("bf16")))
    add("copy", (1 << 30,), 2 * (1 << 30) / (0.9 * bandwidth))
    for work, each in (("clip", 12), ("copy_in", 6), ("copy_out", 4)):
        add(work, (1 << 28,), each * (1 << 28) / (getattr(rates, work) * bandwidth))
    job = job_of(machine, model_of(64, 1, 1, 64), 1, 64)
    job = msgspec.structs.replace(job, optimizer=msgspec.structs.replace(job.optimizer, clip_norm=0.0))
    # Without clipping there is the norm's one pass over gradients beside the update.
    add("update", (1 << 28,), predict_optimizer(job, 1 << 28) - 4 * (1 << 28) / (rates.clip * bandwidth))
    add("launch", (1,), 5e-6)
    add("host.eager", (6,), 6 * rates.eager_host_s)
    add("host.compiled", (6,), 6 * rates.block_host_s)
    add("host.sharded", (6,), 6 * rates.block_host_s + 8 * rates.group_host_s)
    add("to_device", (1 << 28,), (1 << 28) / rates.host_link_bytes_per_s)
    add("to_host", (1 << 28,), (1 << 28) / rates.host_link_bytes_per_s)
    add("host_update", (1 << 24,), 40 * (1 << 24) / rates.host_update_bytes_per_s)
    figures += figures_of_links(machine)
    add("beside.gather", (1 << 30,), 3e-3)
    add("beside.alone", (8192, 4096, 4096), 2e-3 * (1 - rates.contention))
    add("beside.together", (8192, 4096, 4096), 2e-3)
    return Calibration(device="NVIDIA H100", ranks=RANKS, nodes=1, torch="2.13.0", figures=tuple(figures))


def figures_of_links(machine: Cluster) -> list[Figure]:
    """Of every collective: inside a node, and between two."""
    rates, figures = rates_of(machine), list[Figure]()
    pair = Layout(pipeline=2)
    for size in SIZES:
        placed: dict[tuple[Collective, Place], float] = {}
        placements: tuple[tuple[Place, Sequence[int]], ...] = (("node", range(RANKS)), ("across", (0, RANKS)))
        for place, ranks in placements:
            ring = place_ring(ranks, 2 * RANKS, machine)
            kinds: tuple[Collective, ...] = ("all_reduce", "all_gather", "reduce_scatter")
            for kind in kinds:
                placed[kind, place] = predict_collective(kind, size, ring, rates)
            placed["all_to_all", place] = predict_exchange(size, ring, machine, rates)
        placed["send", "node"] = hop_seconds(pair, machine, (0, 1), size, rates)
        for (kind, place), seconds in placed.items():
            if place == "node" or machine.nodes > 1:
                ranks = RANKS if place == "node" else machine.nodes
                figures.append(
                    Figure(work=kind, sizes=(size,), seconds=seconds, spread=0.03, repeats=25, ranks=ranks, place=place)
                )
    return figures


@pytest.mark.parametrize("name", sorted(Rates.__struct_fields__))
def test_a_machine_gets_its_own_rates_back(name: str) -> None:
    machine = other_machine()
    known = msgspec.structs.replace(machine, rates=None, intra=cluster_of("8xh100").intra)
    found = calibrate_cluster(figures_of(machine), known, "2026-11-23")
    assert found.rates is not None
    # Latencies are shares of the link's own, which was measured too.
    factor = found.intra.latency_s / machine.intra.latency_s if name == "latencies" else 1.0
    assert flat(getattr(found.rates, name), factor) == pytest.approx(flat(getattr(rates_of(machine), name)), rel=2e-3)
    assert found.measured is not None
    assert max(found.measured.misfit.values()) < 0.01


def flat(value: Any, factor: float = 1.0) -> list[float]:
    """The numbers of a rate, in the order of their names."""
    if isinstance(value, dict):
        return [number for _, inner in sorted(value.items()) for number in flat(inner, factor)]
    return [inner * factor for inner in value] if isinstance(value, tuple) else [value * factor]


def test_links_between_nodes_are_measured_where_there_are_some() -> None:
    machine = msgspec.structs.replace(other_machine(), nodes=2)
    machine = msgspec.structs.replace(
        machine, inter=msgspec.structs.replace(machine.inter, bytes_per_s=7e9, latency_s=60e-6)
    )
    known = msgspec.structs.replace(machine, rates=None, inter=cluster_of("2x8xh100").inter)
    found = calibrate_cluster(figures_of(machine), known, "2026-11-23")
    assert found.inter.bytes_per_s == pytest.approx(7e9, rel=2e-3)
    assert found.inter.latency_s == pytest.approx(60e-6, rel=2e-3)
    assert found.inter.source == "measured on 2026-11-23"


def test_a_device_that_no_table_has_can_be_planned_for_once_it_is_measured() -> None:
    machine = other_machine()
    row = unknown_gpu("Some GPU", 80e9)
    known = msgspec.structs.replace(machine, rates=None, device=row.device, intra=row.intra)
    job = job_of(known, model_of(1024, 8, 8, 128, feed_forward=4096), 1, 1024)
    assert predict(job).step_s == 0
    found = calibrate_cluster(figures_of(machine), known, "2026-11-23")
    job = msgspec.structs.replace(job, cluster=msgspec.structs.replace(found, devices_per_node=1))
    assert predict(job).step_s > 0
    assert "calibrated on 2026-11-23" in predict(job).notes[0]
    assert found.device.peak_fp32_flops_per_s == pytest.approx(50e12)


def test_what_was_not_measured_is_as_much_faster_as_what_was() -> None:
    machine = other_machine()
    figures = figures_of(machine)
    without = tuple(figure for figure in figures.figures if not figure.work.startswith("attention.flash"))
    known = msgspec.structs.replace(machine, rates=None)
    found = calibrate_cluster(msgspec.structs.replace(figures, figures=without), known, "2026-11-23").rates
    assert found is not None
    old = rates_of(known).attention
    for kernel in ("flash", "flash-1"):
        for way in (0, 1):
            ratio = found.attention[kernel][way] / found.attention["cudnn"][way]
            assert ratio == pytest.approx(old[kernel][way] / old["cudnn"][way], rel=1e-3)


@pytest.mark.parametrize(("spread", "said"), [(0.03, False), (0.9, True)])
def test_a_plan_says_if_the_machine_was_busy(spread: float, said: bool) -> None:
    machine = other_machine()
    figures = tuple(msgspec.structs.replace(one, spread=spread) for one in figures_of(machine).figures)
    found = calibrate_cluster(msgspec.structs.replace(figures_of(machine), figures=figures), machine, "2026-11-23")
    job = job_of(found, model_of(1024, 8, 8, 128, feed_forward=4096), 1, 1024)
    assert ("other programs ran too" in predict(job).notes[0]) == said


@pytest.mark.parametrize("seed", range(20))
def test_figures_of_a_busy_machine_still_make_a_cluster(seed: int) -> None:
    machine, draw = other_machine(), Random(seed)
    figures = figures_of(machine)
    # Other programs take the processor away, for any piece of work up to a hundred times as long.
    late = [msgspec.structs.replace(one, seconds=one.seconds * 10 ** draw.uniform(0, 2)) for one in figures.figures]
    known = msgspec.structs.replace(machine, rates=None)
    found = calibrate_cluster(msgspec.structs.replace(figures, figures=tuple(late)), known, "2026-11-23")
    check_cluster(found, RANKS)
    job = job_of(found, model_of(1024, 8, 8, 128, feed_forward=4096), 1, 1024)
    assert 0 < predict(job).step_s < float("inf")


@pytest.mark.parametrize("seed", range(50))
def test_a_line_through_anything_measured_costs_nothing_negative(seed: int) -> None:
    draw = Random(seed)
    count = draw.randint(1, 8)
    sizes, seconds = ([10 ** draw.uniform(*span) for _ in range(count)] for span in ((0, 9), (-6, 3)))
    intercept, slope = fit_line(sizes, seconds)
    assert intercept >= 0
    assert slope >= 0
    assert intercept + slope > 0
