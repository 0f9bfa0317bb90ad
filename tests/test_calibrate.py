"""Calibrating a machine: through the command, and what a plan makes of the file."""

import os
import signal
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tomli_w
from commands import nothing_left, run, running, wait_until, write_job

from meshwright.plan import predict
from meshwright.spec import Cluster, SettingError
from meshwright.spec.decode import decode_job, encode_job
from meshwright.spec.expand import expand_cluster


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
def folder(tmp_path: Path) -> Path:
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
def test_what_cannot_be_done_is_refused_at_once(folder: Path, arguments: list[str], reason: str) -> None:
    (folder / "taken.toml").write_text("[cluster]\n")
    if arguments[0] == "--out":
        arguments = ["--out", str(folder / arguments[1])]
    done = run("calibrate", "--quick", *arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert reason in done.stderr.replace(f"{folder}/", "")
    assert [path.name for path in folder.iterdir()] == ["taken.toml"]


@pytest.mark.timeout(120)
def test_an_interrupt_leaves_nothing_behind(folder: Path) -> None:
    out = folder / "cluster.toml"
    scratch = folder.parent / "scratch"
    scratch.mkdir()
    with running("calibrate", "--out", out, TMPDIR=str(scratch)) as process:
        wait_until(lambda: any(scratch.glob("*/request.json")), process)
        wait_until(lambda: any(scratch.glob("*/attempts/0")), process)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped; nothing was written" in said
    assert list(folder.iterdir()) == []
    assert list(scratch.glob("meshwright-calibrate-*")) == []
    nothing_left(scratch)


def test_a_calibration_is_of_nodes_that_are_alike(tmp_path: Path) -> None:
    groups = [{"gpus": "2x8xh100"}, {"gpus": "1x4xh100"}]
    cluster = {"groups": groups, "inter": "infiniband-ndr", "measured": {"date": "2026-11-23"}}
    path = tmp_path / "cluster.toml"
    path.write_text(tomli_w.dumps({"cluster": cluster}))
    with pytest.raises(SettingError, match=r"cluster.measured: are of nodes that are alike"):
        expand_cluster(cluster, no_machine)
