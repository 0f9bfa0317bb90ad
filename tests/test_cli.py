"""The command line at its edges: what is mistyped, missing or in the way is one line and exit code 2."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import MESHWRIGHT, TIMEOUT_S, environment, run, write_job
from programs import kineto_trace
from synthetic import a_run

from meshwright import cli
from meshwright.__main__ import main as start
from meshwright.plan import machine

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.toml"

# A Python without what `pip install meshwright` alone does not bring.
WITHOUT_TORCH = """
import sys

LACKING = ("torch", "numpy", "safetensors")

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in LACKING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in LACKING else find_spec(name, package)
"""


class Told:
    """What a command printed in this process, and its exit code."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["meshwright", *map(str, arguments)])
        self.code: object = 0
        try:
            cli.main()
        except SystemExit as ended:
            self.code = ended.code
        self.out, self.err = capsys.readouterr()


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Run the command line in this process."""
    return lambda *arguments: Told(capsys, monkeypatch, *arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian", "job.toml"], "Did you mean 'train'"),
        (["plan", "--modle", "llama3-8b"], "'--model'?"),
        (["explain"], "Missing argument 'RUN|TRACE...'"),
        (["explain", "runs/x", "--gpu", "h100"], "--flops-per-step is lacking"),
        (["plan", "--sequence", "long"], "'long' is not a valid integer"),
        (["sample", "run", "--temperature", "-1"], "--temperature -1.0: must be 0, or lie between 1e-6 and 1e6; "),
        (["sample", "run", "--temperature", "nan"], "--temperature nan: must be 0, or lie between 1e-6 and 1e6; "),
        (["sample", "run", "--temperature", "1e-45"], "nearest that works: --temperature 1e-6"),
        (["sample", "run", "--seed", "9" * 30], "Invalid value for '--seed'"),
        (["sample", "run", "--prompt", os.fsdecode(b"\xff\xfe")], "--prompt: is not text in UTF-8; "),
        (["plan"], "takes a job file, or --model with --gpus"),
        (["plan", "--model", "llama3-8b"], "takes a job file, or --model with --gpus"),
        (["plan", "--model", "llama3-9b", "--gpus", "8xh100"], "nearest that works: llama3-8b"),
        (["plan", "--model", "llama3-8b", "--gpus", "8xh1000"], "nearest that works: h100"),
        (["plan", "--model", "llama3-8b", "--gpus", "8xa100"], "nearest that works: a100-40 or a100-80 or"),
        (["plan", str(QUICKSTART), "--html", "/no/such/plan.html"], "--html /no/such/plan.html: cannot be written"),
        (["plan", str(QUICKSTART), "--html", "."], "--html .: cannot be written"),
        (["plan", str(QUICKSTART), "--cluster", "8xh100", "--cluster", "8xh100"], "is given twice"),
        (["plan", "--model", "llama3-8b", "--gpus", "0xh100"], "holds no device"),
        (["plan", "--model", "llama3-8b", "--gpus", "8xh100", "--sequence", "0"], "--sequence 0: must be at least 1"),
        (["plan", "--model", "llama3-8b", "--gpus", "8xh100", "--global-batch", "0"], "data.global_batch = 0"),
        (["plan", str(QUICKSTART), "--set", "cluster.gpus=8xh100", "--set", "layout.shard=3"], "does not divide"),
        (["plan", str(QUICKSTART), "--gpus", "8xh100"], "--set, as in --set cluster.gpus=8xh100"),
        (["plan", str(QUICKSTART), "--sequence", "8"], "--set, as in --set data.sequence=8192"),
        (["plan", "nowhere.toml"], "cannot be read as a job file"),
        (["plan", str(QUICKSTART), "--set", "run.stepz=3"], "nearest that works: run.steps"),
        (["train", str(QUICKSTART), "--set", "model.name=deepseek-v3"], "training it is not built yet"),
        (["train"], "takes either a job file or --resume RUN"),
        (["train", str(QUICKSTART), "--resume", "runs/x"], "takes either a job file or --resume RUN"),
        (["train", "--resume", "runs/nowhere"], "does not exist"),
        (["explain", str(QUICKSTART.parent)], "holds no job.toml"),
        (["sample", "runs/nowhere"], "does not exist"),
    ],
)
def test_a_slip_is_one_line(
    told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = told(*arguments)
    assert done.code == 2 and done.out == ""
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    assert says in done.err
    assert list(tmp_path.iterdir()) == []


def test_no_command_shows_the_help(told) -> None:
    done = told()
    assert done.code == 2
    for verb in ("plan", "train", "explain", "sample"):
        assert f"\n  {verb} " in done.err
    assert "agent" not in done.err


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["plan", "--help"], ["train", "-h"]])
def test_help_and_version(told, arguments: list[str]) -> None:
    done = told(*arguments)
    assert done.code == 0 and done.out and not done.err


def test_more_devices_than_are_here(told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    job = write_job(tmp_path, cluster={})
    job.write_text(
        job.read_text().replace("processes = 2", 'gpus = "8xh100"').replace("global_batch = 4", "global_batch = 8")
    )
    done = told("train", job)
    assert done.code == 2
    assert "cluster of 8 x h100: this machine has no GPU" in done.err
    assert not (tmp_path / "runs").exists()
    assert told("plan", job).code == 0


def test_devices_that_are_not_here_come_before_the_layout(told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = told("train", QUICKSTART, "--set", "cluster.gpus=8xh100", "--set", "layout.microbatch=5")
    assert done.code == 2 and "cluster of 8 x h100: this machine has no GPU" in done.err


def test_more_ranks_than_devices(told, tmp_path: Path) -> None:
    done = told("train", write_job(tmp_path), "--set", "layout.shard=4")
    assert done.code == 2 and "more ranks than devices" in done.err
    assert not (tmp_path / "runs").exists()


def test_a_job_that_is_far_too_large_is_refused_with_what_fits(told, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(machine, "memory_bytes", lambda: 2.5e9)
    few = ("--set", "cluster.processes=1", "--set", "data.global_batch=64", "--set", "data.sequence=4096")
    wide = ("--set", "model.vocabulary=32000", "--set", "layout.microbatch=64")
    done = told("train", write_job(tmp_path), *few, *wide)
    assert done.code == 2 and done.err.count("\n") == 1
    assert "GB of the 2.5 GB a device has" in done.err and "--set layout.microbatch=" in done.err
    # Parameters, gradients and optimizer states are no matter of prediction: whatever the layout, they are there.
    done = told("train", write_job(tmp_path), "--set", "cluster.processes=1", "--set", "model.name=llama3-8b")
    assert done.code == 2 and "nearest that works: a smaller model" in done.err
    assert not (tmp_path / "runs").exists()


def test_a_run_folder_that_cannot_be_made(told, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    done = told("train", write_job(tmp_path))
    assert done.code == 2 and done.err.count("\n") == 1 and "run folder" in done.err


def test_the_plan_as_json(told) -> None:
    done = told("plan", "--model", "llama3-8b", "--gpus", "8xh100", "--json")
    assert done.code == 0
    plan = json.loads(done.out)
    assert {"verdict", "model", "cluster", "job", "ranked", "rejected", "one_device"} <= set(plan)
    assert plan["one_device"] is None and plan["rejected"]
    best = plan["ranked"][0]
    assert best["layout"]["replica"] * best["layout"]["shard"] == 8
    assert {"useful", "comm.shard", "straggler", "other"} <= set(best["step"])
    assert best["memory"]["parameters"] > 0 and best["tokens_per_s"] > 0
    assert all(rejected["reason"] and rejected["nearest"] for rejected in plan["rejected"])
    assert plan["sequence"] == 8192 and plan["global_batch"] == 128


def test_a_plan_is_indented_under_its_labels_and_ends_no_line_with_spaces(told) -> None:
    lines = told("plan", "--model", "llama3-8b", "--gpus", "8xh100").out.splitlines()
    assert [line for line in lines if line != line.rstrip()] == []
    for label in ("Verdict", "Notes"):
        first = next(number for number, line in enumerate(lines) if line.startswith(label))
        rest = [*lines[first + 1 :], ""]
        wrapped = rest[: rest.index("")]
        assert wrapped and all(line.startswith(" " * (len(label) + 2)) for line in wrapped)


def test_options_of_planning_are_taken(told) -> None:
    options = ("--sequence", "4096", "--global-batch", "16", "--set", "layout.zero=2", "--json")
    plan = json.loads(told("plan", "--model", "llama3-8b", "--gpus", "2x8xh200", *options).out)
    assert (plan["sequence"], plan["global_batch"], plan["job"]["layout"]["zero"]) == (4096, 16, 2)
    assert plan["cluster"]["nodes"] == 2


def test_explain_reads_runs_that_other_programs_wrote(told, tmp_path: Path) -> None:
    folder = a_run(tmp_path / "runs" / "one")
    done = told("explain", folder.path)
    assert done.code == 0 and done.out.endswith(f"report: {folder.report}\n")
    assert json.loads(told("explain", folder.path, "--json").out)["name"] == "run"
    near = told("explain", tmp_path / "runs" / "two")
    assert near.code == 2 and str(folder.path) in near.err


def test_explain_reads_traces(told, tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"rank-{rank}.json").write_text(json.dumps(kineto_trace(rank)))
    one, two = tmp_path / "rank-0.json", tmp_path / "rank-1.json"
    done = told("explain", one, two)
    assert done.code == 0, done.err
    assert "1 step of 2 traces" in done.out and done.out.endswith("report: none; --report FILE writes one\n")
    folder = json.loads(told("explain", tmp_path, "--json").out)
    assert folder["traces"] == [str(one), str(two)] and folder["world_size"] == 2
    assert folder["step"]["account"]["useful"] == 0
    # A tenth of what an H100 does in 10 ms at its dense peak for bf16.
    options = ("--flops-per-step", 989.4e12 * 1e-3, "--gpu", "h100", "--report", tmp_path / "page.html")
    known = told("explain", tmp_path, "--json", *options)
    assert json.loads(known.out)["step"]["account"]["useful"] == pytest.approx(1e-3)
    assert "<h1>" in (tmp_path / "page.html").read_text()
    twice = told("explain", one, one)
    assert twice.code == 2 and "is of rank 0, as" in twice.err
    mixed = told("explain", one, a_run(tmp_path / "run").path)
    assert mixed.code == 2 and "is a run, which is explained alone" in mixed.err


def test_a_report_goes_where_it_is_told(told, tmp_path: Path) -> None:
    folder = a_run(tmp_path / "one")
    assert told("explain", folder.path, "--report", tmp_path / "page.html").out.endswith("page.html\n")
    assert (tmp_path / "page.html").is_file() and not folder.report.exists()


def test_a_report_that_cannot_be_written(told, tmp_path: Path) -> None:
    folder = a_run(tmp_path / "one")
    folder.report.mkdir()
    done = told("explain", folder.path)
    assert done.code == 2
    assert done.err.count("\n") == 1 and "report.html: cannot be written" in done.err


def without_torch(tmp_path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_TORCH)
    return run(*arguments, PYTHONPATH=str(tmp_path))


def test_planning_and_explaining_need_no_torch(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "one")
    assert without_torch(tmp_path, "plan", "--model", "llama3-8b", "--gpus", "8xh100", "--json").returncode == 0
    assert without_torch(tmp_path, "plan", QUICKSTART).returncode == 0
    explained = without_torch(tmp_path, "explain", folder.path)
    assert explained.returncode == 0, explained.stderr
    for command in (("train", QUICKSTART), ("train", "--resume", folder.path), ("sample", folder.path)):
        refused = without_torch(tmp_path, *command)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
        assert f"error: meshwright {command[0]}: PyTorch is not installed here" in refused.stderr
        assert "pip install 'meshwright[train]'" in refused.stderr


def starts_within(seconds: float, *arguments: object) -> bool:
    """Whether a command ends in time, start of the process included; tried again where others hold the cores."""
    for _ in range(6):
        began = time.perf_counter()
        assert run(*arguments).returncode == 0
        if time.perf_counter() - began < seconds:
            return True
    return False


def test_it_starts_at_once() -> None:
    assert starts_within(0.3, "--help")
    assert starts_within(1.0, "plan", "--model", "llama3-8b", "--gpus", "8xh100", "--sequence", 8192, "--json")


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
def test_a_reader_that_goes_away(form: list[str]) -> None:
    command = [*MESHWRIGHT, "plan", str(QUICKSTART), *form]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as plan:
        assert plan.stdout is not None and plan.stderr is not None
        # Gone before the first word is written.
        plan.stdout.close()
        assert plan.stderr.read() == b""
        assert plan.wait(TIMEOUT_S) in (0, 1)


def test_ctrl_c_while_planning_is_quiet(tmp_path: Path) -> None:
    # The interrupt comes while the job is read, every time: from a file that nobody writes to.
    os.mkfifo(tmp_path / "job.toml")
    command = [*MESHWRIGHT, "plan", str(tmp_path / "job.toml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as plan:
        # Opened for writing: it is being read now.
        with (tmp_path / "job.toml").open("w"):
            plan.send_signal(signal.SIGINT)
        out, err = plan.communicate(timeout=TIMEOUT_S)
        assert (plan.returncode, out, err) == (130, b"", b"\n")


def test_the_allocator_grows_its_ranges_unless_somebody_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the command line is loaded, and so before PyTorch is."""
    seen: list[dict[str, str]] = []
    monkeypatch.setattr("meshwright.cli.main", lambda: seen.append(dict(os.environ)))
    for given in ({}, {"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}):
        monkeypatch.setattr(os, "environ", dict(given))
        start()
    assert seen == [
        {"PYTORCH_ALLOC_CONF": "expandable_segments:True"},
        {"PYTORCH_ALLOC_CONF": "backend:native"},
        {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"},
    ]
