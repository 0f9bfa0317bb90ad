"""Calibrating a machine: through the command, and what a plan makes of the file."""

import os
import signal
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tomli_w
import torch
from commands import nothing_left, run, running, wait_until, write_job

from meshwright.plan import predict
from meshwright.spec import Cluster, SettingError
from meshwright.spec.decode import decode_job, encode_job
from meshwright.spec.expand import expand_cluster

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="about GPUs")


def no_machine(processes: int) -> Cluster:
    raise AssertionError(processes)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that the command wrote of two processes here."""
    path = tmp_path_factory.mktemp("calibrated") / "cluster.toml"
    done = run("calibrate", "--quick", "--processes", 2, "--out", path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"written: {path}\n")
    assert len(done.stdout.splitlines()) == 1
    return path


def read_table(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text())


@pytest.mark.timeout(240)
def test_the_file_is_a_cluster_and_says_how_sure_it_is(calibrated: Path) -> None:
    table = read_table(calibrated)
    assert set(table) == {"cluster"}
    assert "groups" not in table["cluster"]
    cluster = msgspec.convert(expand_cluster(table["cluster"], no_machine), Cluster)
    assert (cluster.devices, cluster.device.kind) == (2, "cpu")
    rates, measured = cluster.rates, cluster.measured
    assert rates is not None
    assert measured is not None
    assert measured.processes == 2
    assert measured.date in cluster.intra.source
    # Each of these was measured here, and says how far its repeats lay apart.
    assert {"memory", "matmul", "attention", "scores", "eager", "loss", "update", "clip", "links"} <= set(
        measured.spread
    )
    assert all(spread >= 0 for spread in measured.spread.values())
    assert set(measured.spread) - {"memory"} <= set(rates.__struct_fields__)
    figures = [line for line in calibrated.read_text().splitlines() if line.startswith("# ")]
    for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send", "beside.together", "launch"):
        assert any(line.startswith(f"# {kind} ") for line in figures), kind


@pytest.mark.timeout(240)
def test_a_job_is_planned_with_what_was_measured(calibrated: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path)
    plain = run("plan", job)
    assert plain.returncode == 0, plain.stderr
    assert "meshwright calibrate" in plain.stdout
    date = read_table(calibrated)["cluster"]["measured"]["date"]
    planned = run("plan", job, "--cluster", calibrated)
    assert planned.returncode == 0, planned.stderr
    assert f"calibrated on {date} with 2 processes" in " ".join(planned.stdout.split())
    # The same section stands in a job file as well, and comes out of a resolved job unchanged.
    table = read_table(job) | read_table(calibrated)
    inside = decode_job(table, local=no_machine)
    assert decode_job(tomllib.loads(encode_job(inside)), local=no_machine) == inside


@pytest.mark.timeout(240)
def test_rates_of_a_cluster_are_reckoned_with(calibrated: Path, tmp_path: Path) -> None:
    table = read_table(write_job(tmp_path)) | read_table(calibrated)
    job = decode_job(table, local=no_machine)
    table["cluster"]["rates"]["matmul"] /= 2
    slower = decode_job(table, local=no_machine)
    assert predict(slower).step.compute > predict(job).step.compute
    latencies = table["cluster"]["rates"]["latencies"]
    table["cluster"]["rates"]["latencies"] = dict.fromkeys(latencies, 1000.0)
    later = decode_job(table, local=no_machine)
    assert predict(later).step.comm_shard > predict(slower).step.comm_shard


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("keys", "value", "reason"),
    [
        (("rates", "matmul"), 0.0, "cluster.rates.matmul = 0.0: must lie between 1e-06 and 1000.0"),
        (("rates", "step_s"), -1.0, "cluster.rates.step_s = -1.0: must lie between 0.0 and 1000.0"),
        (("rates", "attention", "cudnn"), [0.5, float("nan")], "cluster.rates.attention.cudnn = nan"),
        (("rates", "links"), {"all_reduce": 1.0}, "cluster.rates.links.all_gather: is missing"),
        (("rates", "matmull"), 0.5, "cluster.rates.matmull: no such setting"),
        (("rates", "scores"), "fast", "cluster.rates.scores = "),
        (("rates",), 3, "cluster.rates = 3: is a section"),
        (("measured", "date"), 3, "cluster.measured.date = 3: must be text"),
    ],
)
def test_rates_that_no_machine_has_are_refused(
    calibrated: Path, tmp_path: Path, keys: tuple[str, ...], value: Any, reason: str
) -> None:
    table = read_table(write_job(tmp_path)) | read_table(calibrated)
    inner = table["cluster"]
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    with pytest.raises(SettingError, match="cluster") as refused:
        decode_job(table, local=no_machine)
    assert reason in str(refused.value)


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """An empty folder that commands run in."""
    here = tmp_path / "empty"
    here.mkdir()
    return here


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--processes", "0"], "--processes 0: must lie between 1 and 1024; nearest that works: --processes 1"),
        (["--processes", "-3"], "--processes -3: must lie between 1 and 1024"),
        (["--processes", "two"], "'two' is not a valid integer"),
        (["--out", "there/cluster.toml"], "there is no folder there"),
        (["--out", "taken.toml"], "exists already"),
    ],
)
def test_what_cannot_be_done_is_refused_at_once(empty: Path, arguments: list[str], reason: str) -> None:
    (empty / "taken.toml").write_text("[cluster]\n")
    if arguments[0] == "--out":
        arguments = ["--out", str(empty / arguments[1])]
    done = run("calibrate", "--quick", *arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert reason in done.stderr.replace(f"{empty}/", "")
    assert [path.name for path in empty.iterdir()] == ["taken.toml"]


@pytest.mark.timeout(120)
def test_an_interrupt_leaves_nothing_behind(empty: Path) -> None:
    out = empty / "cluster.toml"
    scratch = empty.parent / "scratch"
    scratch.mkdir()
    with running("calibrate", "--out", out, TMPDIR=str(scratch)) as process:
        wait_until(lambda: any(scratch.glob("*/request.json")), process)
        wait_until(lambda: any(scratch.glob("*/attempts/0")), process)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped; nothing was written" in said
    assert list(empty.iterdir()) == []
    assert list(scratch.glob("meshwright-calibrate-*")) == []
    nothing_left(scratch)


@needs_gpu
@pytest.mark.timeout(300)
def test_a_gpu_is_measured_with_what_only_it_has(empty: Path, tmp_path: Path) -> None:
    out = empty / "cluster.toml"
    with running("calibrate", "--quick", "--out", out, CUDA_VISIBLE_DEVICES="0") as process:
        _, said = process.communicate(timeout=280)
    assert process.returncode == 0, said
    table = read_table(out)
    cluster = msgspec.convert(expand_cluster(table["cluster"], no_machine), Cluster)
    assert cluster.measured is not None
    assert cluster.measured.device == torch.cuda.get_device_name(0)
    assert cluster.measured.cuda == torch.version.cuda
    assert {"elementwise", "host_link_bytes_per_s", "host_update_bytes_per_s"} <= set(cluster.measured.spread)
    job = decode_job(read_table(write_job(tmp_path, layout={"shard": 1})) | table, local=no_machine)
    assert "calibrated on" in predict(job).notes[0]


@needs_gpu
def test_processes_are_not_counted_where_there_are_gpus(empty: Path) -> None:
    done = run("calibrate", "--processes", 2, "--out", empty / "cluster.toml", CUDA_VISIBLE_DEVICES="0")
    assert done.returncode == 2
    assert "counts CPU processes" in done.stderr


def test_a_calibration_is_of_nodes_that_are_alike(tmp_path: Path) -> None:
    groups = [{"gpus": "2x8xh100"}, {"gpus": "1x4xh100"}]
    cluster = {"groups": groups, "inter": "infiniband-ndr", "measured": {"date": "2026-11-23"}}
    path = tmp_path / "cluster.toml"
    path.write_text(tomli_w.dumps({"cluster": cluster}))
    with pytest.raises(SettingError, match=r"cluster.measured: are of nodes that are alike"):
        expand_cluster(cluster, no_machine)
