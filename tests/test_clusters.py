"""Clusters as jobs describe them: networks by name or by ports, nodes that are not alike, prices, their own files."""

import tomllib
from math import isclose
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from jobs import cpu_cluster
from test_plan import printed

from meshwright.cli import cli
from meshwright.plan import Goal, Plan, build_plan, predict
from meshwright.report.plan import plan_json
from meshwright.spec import Cluster, Job, SettingError, check_trained
from meshwright.spec.decode import decode_job, encode_job, place_cluster, planning_job, read_cluster, read_job
from meshwright.spec.devices import NODES
from meshwright.spec.hardware import cluster_of
from meshwright.spec.links import FABRICS, NETWORKS, share_ports

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.toml"


def placed(text: str) -> Cluster:
    """The cluster of a [cluster] section's lines."""
    return place_cluster(tomllib.loads(text), cpu_cluster)


def refused(text: str) -> SettingError:
    with pytest.raises(SettingError) as caught:
        placed(text)
    return caught.value


def job_on(cluster: str, *settings: str, model: str = "llama-1b-untied", global_batch: int = 32) -> Job:
    return planning_job(
        model=model, gpus=tomllib.loads(cluster), sequence=2048, global_batch=global_batch, settings=settings
    )


# --- Links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_taken_by_its_name(name: str) -> None:
    inter = placed(f'gpus = "2x8xh100"\ninter = "{name}"').inter
    # Ethernet has a port a node, the others a port a device.
    devices = 8 if name.startswith("ethernet") else 1
    rate = float(name.rpartition("-")[2]) if name.startswith(("ethernet", "roce")) else NETWORKS[name].gbit_per_s
    assert inter.bytes_per_s == pytest.approx(rate * 1e9 / 8 / devices)
    assert inter.latency_s > 0 and len(inter.source) > 10


@pytest.mark.parametrize("name", FABRICS)
def test_a_link_inside_a_node_is_taken_by_its_name(name: str) -> None:
    cluster = placed(f'gpus = "8xh100"\nintra = "{name}"')
    assert cluster.intra == FABRICS[name]
    numbers = msgspec.to_builtins(cluster.device)
    given = decode_cluster({"device": numbers, "devices_per_node": 8, "intra": name, "inter": "roce-200"})
    assert (given.intra, given.inter.bytes_per_s) == (FABRICS[name], 25e9)


def decode_cluster(section: dict[str, Any]) -> Cluster:
    return place_cluster(section, cpu_cluster)


def test_infiniband_doubles_with_each_generation() -> None:
    rates = [NETWORKS[f"infiniband-{name}"].gbit_per_s for name in ("edr", "hdr", "ndr", "xdr")]
    assert rates == [100, 200, 400, 800]


@pytest.mark.parametrize(
    ("inter", "gigabytes_per_s"),
    [
        ('"8xroce-200"', 25),
        ('"roce-200"', 25),
        ('"4xinfiniband-hdr"', 12.5),
        ('"16xinfiniband-hdr"', 50),
        ('"2xethernet-100"', 3.125),
        ("{gbit_per_s = 200, ports = 4}", 12.5),
        ("{gbit_per_s = 100, ports = 4, latency_s = 2e-5}", 6.25),
        ('{name = "mine", bytes_per_s = 3e9, latency_s = 1e-5, source = "measured"}', 3),
    ],
)
def test_ports_of_a_node_are_shared_by_its_devices(inter: str, gigabytes_per_s: float) -> None:
    link = placed(f'gpus = "4x8xh100"\ninter = {inter}').inter
    assert link.bytes_per_s == pytest.approx(gigabytes_per_s * 1e9)
    assert ("latency_s" not in inter) or link.latency_s == pytest.approx(2e-5 if "2e-5" in inter else 1e-5)


def test_a_slower_network_never_makes_a_step_faster() -> None:
    steps = [
        predict(job_on(f'gpus = "2x8xh100"\ninter = "{name}"', "layout.shard=16")).step_s
        for name in ("infiniband-xdr", "infiniband-hdr", "2xinfiniband-edr", "ethernet-10")
    ]
    assert steps == sorted(steps) and steps[-1] > 2 * steps[0]


def test_an_ethernet_port_is_shared_by_as_many_devices_as_there_are() -> None:
    assert cluster_of("2x4xl40s").inter.bytes_per_s == 2 * cluster_of("2x8xl40s").inter.bytes_per_s
    assert share_ports(NETWORKS["ethernet-100"], 1).bytes_per_s == 12.5e9


def test_a_rack_of_gb200_is_one_node() -> None:
    cluster = cluster_of("72xgb200")
    assert (cluster.nodes, cluster.devices_per_node) == (1, 72)
    # 130 TB/s of NVLink over the rack, both directions.
    assert 72 * 2 * cluster.intra.bytes_per_s == pytest.approx(130e12, rel=0.01)


@pytest.mark.parametrize(
    ("text", "setting", "says", "nearest"),
    [
        ('gpus = "8xh100"\ninter = "infiniban-hdr"', "cluster.inter", "no such network", '"infiniband-hdr"'),
        ('gpus = "8xh100"\ninter = "nvlink-4"', "cluster.inter", "inside a node", '"infiniband-edr"'),
        ('gpus = "8xh100"\nintra = "roce-200"', "cluster.intra", "joins nodes", '"nvlink-2"'),
        ('gpus = "8xh100"\nintra = "nvlink4"', "cluster.intra", "no such link", '= "nvlink-4"'),
        ('gpus = "8xh100"\ninter = "0xroce-200"', "ports = 0", "between 1 and", "ports = 1"),
        ('gpus = "8xh100"\ninter = {gbit_per_s = 0, ports = 1}', "cluster.inter.gbit_per_s = 0", "between", "0.001"),
        ('gpus = "8xh100"\ninter = {gbit_per_s = 100}', "cluster.inter.ports", "missing", "add ports"),
        ('gpus = "8xh100"\ninter = {gbit_per_s = 100, ports = -2}', "ports = -2", "between", "ports = 1"),
        ('gpus = "8xh100"\ninter = {gbit_per_s = 1, ports = 1, source = ""}', "source", "cannot stand", "one of"),
        ('gpus = "8xh100"\ninter = {bytes_per_s = 0}', "cluster.inter", "missing", "add"),
        ('gpus = "8xh100"\nintra = {gbit_per_s = 1, ports = 1}', "intra.gbit_per_s", "between nodes", "bytes_per_s"),
        ('gpus = "8xh100"\nnodes = 2', "cluster.nodes", "cannot stand beside cluster.gpus", "one of the two"),
        ('gpus = "8xh100"\nprice_per_device_hour = -1', "price_per_device_hour", "between", "= 0.0"),
        ('gpus = "8xh100"\nprice_per_device_hour = nan', "price_per_device_hour", "between", "= 0.0"),
        ('gpus = "8xh100"\nprice_per_device_hour = "2"', "price_per_device_hour", "must be a number", ""),
        ('gpus = "8xh100"\nprize_per_device_hour = 2', "prize_per_device_hour", "no such", "price_per_device_hour"),
        ('gpus = "8xb100"', '"8xb100"', "no device", "h100"),
        ('gpus = "8xh100 + 8xmi300x"', '"8xh100 + 8xmi300x"', "cannot train one model together", "one kind"),
        ('gpus = "8xh100 +"', '"8xh100 +"', "must look like", "8xh100"),
        ('gpus = "99999x99999xh100"', "x devices_per_node", "between 1 and", "1048576"),
        ('[[groups]]\ngpus = "8xh100"', "cluster.inter", "missing", "infiniband-edr"),
        ('inter = "roce-200"\n[[groups]]\ngpus = "8xh100"\nnodes = 2', "groups[0].nodes", "cannot stand", "one of"),
        ('inter = "roce-200"\n[[groups]]\ngpus = "8xh100 + 4xh100"', "groups[0].gpus", "more than one", "for each"),
        ('nodes = 3\ninter = "roce-200"\n[[groups]]\ngpus = "8xh100"', "cluster.nodes = 3", "not what", "leave it"),
        ("groups = 3", "cluster.groups", "must be a list", "[[cluster.groups]]"),
    ],
)
def test_what_is_no_cluster_is_refused_in_one_line(text: str, setting: str, says: str, nearest: str) -> None:
    error = refused(text)
    assert setting in error.setting and says in error.reason and nearest in error.nearest
    assert "\n" not in str(error)


# --- Nodes that are not alike ----------------------------------------------------------------------------------------


def test_nodes_that_are_not_alike_are_cut_to_what_divides_all() -> None:
    cluster = cluster_of("3x8xh100 + 4xh100")
    assert (cluster.devices, cluster.nodes, cluster.devices_per_node) == (28, 7, 4)
    assert cluster.device == NODES["h100"].device
    assert cluster.label() == "3 nodes of 8 x h100 and 1 node of 4 x h100"
    assert cluster_of("2x8xh100 + 8xh100") == cluster_of("3x8xh100")


def test_of_unlike_devices_the_least_counts() -> None:
    cluster = cluster_of("8xh100 + 2x8xa100-40")
    both = [NODES["h100"].device, NODES["a100-40"].device]
    for figure in ("memory_bytes", "memory_bytes_per_s", "peak_bf16_flops_per_s", "peak_fp8_flops_per_s"):
        assert getattr(cluster.device, figure) == min(getattr(device, figure) for device in both)
    assert cluster.device.name == "a100-40 + h100"
    assert (cluster.intra, cluster.inter) == (FABRICS["nvlink-3"], cluster_of("8xa100-40").inter)
    # Neither has the other's kind of 16 bits: what both do is no faster than the slower.
    oldest = cluster_of("8xa100-40 + 8xv100-32").device
    assert (oldest.peak_bf16_flops_per_s, oldest.peak_flops_per_s("bf16")) == (0, 125e12)


def test_groups_in_sections_are_the_same_as_in_words() -> None:
    text = 'inter = "infiniband-ndr"\n[[groups]]\ngpus = "3x8xh100"\n[[groups]]\ngpus = "4xh100"'
    assert placed(text) == cluster_of("3x8xh100 + 4xh100")
    own = msgspec.to_builtins(cluster_of("4xh100").plain())
    section = {"inter": "infiniband-ndr", "groups": [{"gpus": "3x8xh100", "intra": "nvlink-4"}, own]}
    assert decode_cluster(section) == cluster_of("3x8xh100 + 4xh100")


def test_a_group_with_impossible_rates_is_named() -> None:
    own = msgspec.to_builtins(cluster_of("4xh100").plain())
    own["device"] = own["device"] | {"memory_bytes": 0.0}
    with pytest.raises(SettingError, match=r"cluster\.groups\[1\]\.device\.memory_bytes = 0\.0"):
        decode_cluster({"inter": "roce-200", "groups": [{"gpus": "8xh100"}, own]})


@pytest.mark.parametrize(
    "cluster", ['gpus = "8xh100 + 4xa100-80"\nprice_per_device_hour = 2', 'gpus = "2x8xh100"\ninter = "4xroce-100"']
)
def test_a_written_job_has_its_cluster_again(tmp_path: Path, cluster: str) -> None:
    job = job_on(cluster)
    file = tmp_path / "job.toml"
    file.write_text(encode_job(job))
    assert read_job(file, local=cpu_cluster) == job


def test_ranks_on_unlike_devices_are_as_fast_as_the_slowest() -> None:
    mixed = build_plan(job_on('gpus = "8xh100 + 8xa100-80"'))
    slow = build_plan(job_on('gpus = "2x8xa100-80"'))
    assert mixed.ranked[0].step_s == pytest.approx(slow.ranked[0].step_s)
    assert mixed.ranked[0].memory == slow.ranked[0].memory
    # 8 H100s have more than half of the peak of 16, and need no network.
    alone = {one.nodes.device.name: one.best for one in mixed.alone}
    assert alone["h100"] is not None and alone["h100"].step_s < mixed.ranked[0].step_s
    assert "8 x h100 alone do better" in mixed.verdict
    assert alone["h100"] == build_plan(job_on('gpus = "8xh100"\ninter = "infiniband-hdr"')).ranked[0]
    assert msgspec.json.decode(plan_json(mixed), type=Plan) == mixed


def test_axes_inside_a_node_stay_inside_the_smallest() -> None:
    plan = build_plan(job_on('gpus = "3x8xh100 + 4xh100"', model="llama3-8b", global_batch=56))
    assert {p.layout.tensor for p in plan.ranked} <= {1, 2, 4}
    assert "planned for: 7 nodes of 4 x h100" in plan.verdict
    assert plan.ranked[0].layout.world_size == 28 and "No kind of them does better alone" in plan.verdict
    text = printed(plan)
    assert "3 nodes of 8 x h100 and 1 node of 4 x h100" in text
    assert max(len(line) for line in text.splitlines()) <= 100


def test_what_fits_the_larger_devices_alone_is_found() -> None:
    job = job_on('gpus = "8xh200 + 2xrtx4090"', model="qwen3-32b", global_batch=8)
    plan = build_plan(job, Goal(fixed={"offload": "none"}))
    assert plan.ranked == () and "8 x h200 alone do better" in plan.verdict


# --- Prices ----------------------------------------------------------------------------------------------------------


def test_costs_are_shown_only_with_a_price() -> None:
    plain = build_plan(job_on('gpus = "8xh100"'))
    assert plain.costs is None and "Cost" not in printed(plain)
    timed = build_plan(job_on('gpus = "8xh100"'), Goal(tokens=10**9))
    assert timed.costs is not None and timed.costs.own.step is None
    assert "Cost" not in printed(timed) and "1,000,000,000 tokens" in printed(timed)


def test_a_cost_is_the_price_of_the_devices_for_as_long_as_they_work() -> None:
    plan = build_plan(job_on('gpus = "8xh100"\nprice_per_device_hour = 3.6', "layout.shard=8"), Goal(tokens=10**9))
    assert plan.costs is not None
    own, cheapest = plan.costs.own, plan.costs.cheapest
    assert own.run is not None and own.run_s is not None
    assert own.step == pytest.approx(8 * 0.001 * plan.job.step_s)
    assert own.run_s == pytest.approx(10**9 / plan.job.tokens_per_s)
    assert own.run == pytest.approx(8 * 0.001 * own.run_s)
    assert own.million_tokens is not None and isclose(own.run, 1000 * own.million_tokens)
    # The first in rank may be as cheap, and no listed layout is cheaper.
    assert cheapest is not None and cheapest.million_tokens is not None
    for p in plan.ranked:
        assert cheapest.million_tokens <= 1.0001 * p.layout.world_size * 0.001 * 1e6 / p.tokens_per_s
    assert "Cost" in printed(plan) and "million tokens" in printed(plan)
    assert msgspec.json.decode(plan_json(plan), type=Plan) == plan


def test_this_machine_may_have_a_price() -> None:
    job = read_job(QUICKSTART, ["cluster.price_per_device_hour=1", "layout.shard=2"], local=cpu_cluster)
    assert job.cluster == msgspec.structs.replace(cpu_cluster(2), price_per_device_hour=1.0)


# --- Cluster files ---------------------------------------------------------------------------------------------------


def test_a_cluster_file_takes_the_place_of_the_jobs(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('[cluster]\ngpus = "2x8xh100"\ninter = "8xroce-200"\nprice_per_device_hour = 2\n')
    job = read_job(QUICKSTART, local=cpu_cluster, cluster=read_cluster(str(file)))
    assert job.cluster == placed('gpus = "2x8xh100"\ninter = "roce-200"\nprice_per_device_hour = 2')
    assert read_job(QUICKSTART, local=cpu_cluster, cluster=read_cluster("8xh100")).cluster == cluster_of("8xh100")
    shown = CliRunner().invoke(cli, ["plan", str(QUICKSTART), "--cluster", str(file)])
    assert shown.exit_code == 0 and "2 nodes of 8 x h100" in shown.output and "Cost" in shown.output
    # What is set changes the cluster of the file.
    settings = ["--set", "cluster.price_per_device_hour=4", "--json"]
    planned = CliRunner().invoke(cli, ["plan", "--model", "llama-1b-untied", "--cluster", str(file), *settings])
    assert msgspec.json.decode(planned.output, type=Plan).cluster.price_per_device_hour == 4


@pytest.mark.parametrize(
    ("text", "word", "says"),
    [
        ("", "", "has no [cluster] section"),
        ("cluster = 3", "", "has no [cluster] section"),
        ("[cluster", "", "is not TOML"),
        (None, "none.toml", "cannot be read as a cluster file"),
        (None, "8xh10", "no device"),
        (None, "8 of h100", "must look like"),
    ],
)
def test_what_is_no_cluster_file_is_refused(tmp_path: Path, text: str | None, word: str, says: str) -> None:
    file = tmp_path / "a.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SettingError) as caught:
        read_cluster(word or str(file))
    assert says in caught.value.reason


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "llama3-8b", "--gpus", "8xh100", "--cluster", "8xh100"],
        ["--model", "llama3-8b", "--gpus", "8xh100", "--tokens", "0"],
        ["--model", "llama3-8b", "--gpus", "8xh100", "--tokens", "nan"],
        ["--cluster", "8xh100"],
    ],
)
def test_options_that_contradict_are_refused(arguments: list[str]) -> None:
    caught = CliRunner().invoke(cli, ["plan", *arguments])
    assert isinstance(caught.exception, SettingError)


# --- Planned, and not trained ----------------------------------------------------------------------------------------


def test_fp8_speeds_up_the_blocks_products_alone() -> None:
    wide, narrow = (
        job_on('gpus = "8xh100"', f"layout.precision={name}", model="llama3-8b") for name in ("bf16", "fp8")
    )
    before, after = predict(wide), predict(narrow)
    assert after.memory == before.memory
    assert before.step_s / 2 < after.step_s < 0.9 * before.step_s
    assert before.step.useful / 2 < after.step.useful < before.step.useful
    assert after.step.comm_shard >= before.step.comm_shard
    assert any("fp8" in note for note in after.notes)


def test_fp8_is_refused_where_there_is_none_and_everywhere_in_training() -> None:
    with pytest.raises(SettingError, match=r"no fp8 products are known of a100-80"):
        job_on('gpus = "8xa100-80"', "layout.precision=fp8")
    with pytest.raises(SettingError, match=r"no fp8 products are known of a100-80 \+ h100"):
        job_on('gpus = "8xa100-80 + 8xh100"', "layout.precision=fp8")
    with pytest.raises(SettingError, match=r"training with it is not built"):
        check_trained(job_on('gpus = "8xh100"', "layout.precision=fp8"))


@pytest.mark.parametrize("name", ["mi300x", "tpu-v5p"])
def test_other_makes_are_planned_and_not_trained_on(name: str) -> None:
    job = job_on(f'gpus = "8x{name}"')
    plan = build_plan(job)
    assert job.layout.precision == "bf16" and plan.ranked and plan.ranked[0].step_s > 0
    # As on NVIDIA's, blocks are compiled and transfers hidden.
    assert plan.ranked[-1].overlapped or any(p.overlapped for p in plan.ranked)
    assert any("unproven" in note for note in plan.job.notes)
    with pytest.raises(SettingError, match="training there is not built"):
        check_trained(job)
    caught = CliRunner().invoke(cli, ["train", str(QUICKSTART), "--set", f"cluster.gpus=8x{name}"])
    assert isinstance(caught.exception, SettingError) and "training there is not built" in caught.exception.reason


def test_a_device_without_bf16_is_planned_at_its_fp16_peak() -> None:
    job = job_on('gpus = "8xv100-32"', "layout.shard=8")
    prediction = predict(job)
    assert prediction.step_s > 0 and any("no bf16" in note for note in prediction.notes)
    with pytest.raises(SettingError, match="v100-32 has none"):
        check_trained(job)
    check_trained(job_on('gpus = "8xv100-32"', "layout.precision=fp32"))


@pytest.mark.parametrize(
    ("setting", "says"), [("layout.offload=optimizer", "of GPUs alone"), ("layout.async_tensor=true", "needs GPUs")]
)
def test_what_only_gpus_have_is_refused_on_tpus(setting: str, says: str) -> None:
    with pytest.raises(SettingError, match=says):
        job_on('gpus = "8xtpu-v5e"', setting, "layout.tensor=2", "layout.shard=4")


def test_a_cluster_that_was_made_in_python_decodes() -> None:
    section = msgspec.to_builtins(cluster_of("8xh100 + 4xh100"))
    table = tomllib.loads(QUICKSTART.read_text()) | {"cluster": section}
    assert decode_job(table, local=cpu_cluster).cluster == cluster_of("8xh100 + 4xh100")
