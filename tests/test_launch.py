"""Runs through the command: to the end, stopped, crashed, killed, refused, and under somebody else's torchrun.

Every rank's environment names the test's folder, so that one that is left behind is found.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from commands import (
    TIMEOUT_S,
    environment,
    lines_in,
    nothing_left,
    processes_of,
    run,
    running,
    wait_until,
    write_job,
)
from jobs import cpu_cluster

from meshwright.launch import begin_attempt
from meshwright.record import Ended, Metrics, RunFolder, Span, read_events, read_lines
from meshwright.spec.decode import read_job

ENDLESS = {"name": "tiny", "steps": 1_000_000}


def losses_of(run_folder: Path) -> list[tuple[int, float | None]]:
    """Every line of metrics, repeated steps and all."""
    return [(line.step, line.loss) for line in read_lines(run_folder / "metrics.jsonl", Metrics)]


def test_what_convert_will_refuse_is_said_before_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin_attempt(None, read_job(write_job(tmp_path), ["run.name=plain"], local=cpu_cluster))
    assert capsys.readouterr().err == ""
    begin_attempt(None, read_job(write_job(tmp_path), ["model.attention_window=8"], local=cpu_cluster))
    assert capsys.readouterr().err == (
        "warning: meshwright convert will refuse this run: model.attention_window = 8: LlamaForCausalLM of "
        "transformers has no word for it; nearest that works: model.attention_window = 0\n"
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A job trained to its end, and what the command printed."""
    folder = tmp_path_factory.mktemp("finished")
    job = write_job(folder, trace={"every_steps": 4}, run={"name": "tiny", "folder": str(folder / "runs"), "steps": 8})
    return folder / "runs" / "tiny", run("train", job, MARK=str(folder))


def test_train_explain_sample(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run_folder, train = finished
    assert train.returncode == 0, train.stderr
    assert "Traceback" not in train.stderr
    assert f"meshwright explain {run_folder}" in train.stdout
    assert [step for step, _ in losses_of(run_folder)] == list(range(8))
    assert sorted(p.name for p in (run_folder / "checkpoints").iterdir()) == ["step-8"]
    nothing_left(run_folder.parents[1])

    explained = run("explain", run_folder)
    assert explained.returncode == 0, explained.stderr
    assert (run_folder / "report.html").is_file()
    told = json.loads(run("explain", run_folder, "--json").stdout)
    assert told["ending"] == "finished" and told["world_size"] == 2 and not told["faults"]
    assert told["step"]["steps"] == [6] and not told["missing_ranks"]

    sampled = run("sample", run_folder, "--tokens", 5, "--prompt", "wor")
    assert sampled.returncode == 0, sampled.stderr
    assert sampled.stdout.startswith("wor")


def test_a_finished_run_is_neither_overwritten_nor_resumed(finished: tuple[Path, object]) -> None:
    run_folder = finished[0]
    before = (run_folder / "metrics.jsonl").read_bytes()
    again = run("train", run_folder.parents[1] / "job.toml")
    assert again.returncode == 2 and again.stderr.count("\n") == 1
    assert f"--resume {run_folder}, or --set run.name=tiny-2" in again.stderr
    resumed = run("train", "--resume", run_folder)
    assert resumed.returncode == 2 and "all 8 steps are done" in resumed.stderr
    assert "--set run.steps=16" in resumed.stderr
    forbidden = run("train", "--resume", run_folder, "--set", "data.sequence=8")
    assert forbidden.returncode == 2 and "cannot change in a run that has begun" in forbidden.stderr
    slip = run("train", "--resume", run_folder, "--set", "run.stepz=20")
    assert slip.returncode == 2 and "run.stepz: no such setting; nearest that works: run.steps" in slip.stderr
    assert (run_folder / "metrics.jsonl").read_bytes() == before


def test_ctrl_c_saves_and_resume_goes_on(tmp_path: Path) -> None:
    job = write_job(tmp_path, run=ENDLESS | {"folder": str(tmp_path / "runs")})
    run_folder = tmp_path / "runs" / "tiny"
    with running("train", job, MARK=str(tmp_path)) as train:
        wait_until(lambda: lines_in(run_folder / "metrics.jsonl") > 4, train)
        # Twice within a moment, as timeout does it, is once.
        os.killpg(train.pid, signal.SIGTERM)
        time.sleep(0.02)
        os.killpg(train.pid, signal.SIGTERM)
        out, err = train.communicate(timeout=30)
    assert train.returncode == 130, err
    assert err.count("stopping after this step") == 1
    assert "Traceback" not in err
    assert f"meshwright train --resume {run_folder}" in out
    nothing_left(tmp_path)

    done = [step for step, _ in losses_of(run_folder)]
    ended = [e for lines in read_events(RunFolder(run_folder), 0).values() for e in lines if isinstance(e, Ended)]
    assert [(e.step, e.how) for e in ended] == [(done[-1], "stopped")] * 2
    assert [p.name for p in (run_folder / "checkpoints").iterdir()] == [f"step-{len(done)}"]

    resumed = run("train", "--resume", run_folder, "--set", f"run.steps={len(done) + 5}", MARK=str(tmp_path))
    assert resumed.returncode == 0, resumed.stderr
    assert [step for step, _ in losses_of(run_folder)] == list(range(len(done) + 5))
    nothing_left(tmp_path)


@pytest.mark.parametrize("moment", ["at once", "as the ranks start"])
def test_ctrl_c_before_the_first_step(tmp_path: Path, moment: str) -> None:
    job = write_job(tmp_path)
    run_folder = tmp_path / "runs" / "tiny"
    ranks = 1 if moment == "at once" else 3
    with running("train", job, MARK=str(tmp_path)) as train:
        # The command itself, then the agent, then the ranks.
        wait_until(
            lambda: (run_folder / "attempts/0/plan.json").is_file() and len(processes_of(tmp_path)) > ranks, train
        )
        train.send_signal(signal.SIGINT)
        _, err = train.communicate(timeout=30)
    assert train.returncode == 130
    assert err == "stopped before the first step; nothing to save\n"
    nothing_left(tmp_path)
    # Nothing was trained, so nothing stands in the way of the next try.
    assert not run_folder.exists()


SLOW_EVALUATION = """
import sys, time

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "meshwright.train.loop":
            sys.meta_path.remove(self)
            from meshwright.train import evaluate
            evaluate.evaluate = lambda *arguments: time.sleep(60)

sys.meta_path.insert(0, Finder())
"""


@pytest.mark.slow
def test_ctrl_c_in_the_first_evaluation_stops_at_once(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    run_folder = tmp_path / "runs" / "tiny"
    (tmp_path / "sitecustomize.py").write_text(SLOW_EVALUATION)
    with running("train", job, MARK=str(tmp_path), PYTHONPATH=with_this(tmp_path)) as train:
        wait_until(lambda: lines_in(run_folder / "attempts/0/events/rank-1.jsonl") > 0, train)
        train.send_signal(signal.SIGINT)
        out, err = train.communicate(timeout=30)
    assert train.returncode == 130
    assert out.endswith("evaluating before step 1: up to 2 held-out samples\n")
    assert err == "stopped before the first step; nothing to save\n"
    nothing_left(tmp_path)
    assert not run_folder.exists()


SLOW_STEP = """
import sys, time

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "meshwright.train.worker":
            sys.meta_path.remove(self)
            from meshwright.train import loop
            set_learning_rate = loop.set_learning_rate
            def slow(optimizer, step, job):
                time.sleep(60 if step == 3 else 0)
                return set_learning_rate(optimizer, step, job)
            loop.set_learning_rate = slow

sys.meta_path.insert(0, Finder())
"""


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    job = write_job(tmp_path, checkpoint={"every_steps": 2})
    run_folder = tmp_path / "runs" / "tiny"
    (tmp_path / "sitecustomize.py").write_text(SLOW_STEP)
    with running("train", job, MARK=str(tmp_path), PYTHONPATH=with_this(tmp_path)) as train:
        wait_until(lambda: lines_in(run_folder / "metrics.jsonl") > 3, train)
        for _ in range(2):
            train.send_signal(signal.SIGINT)
            time.sleep(0.5)
        _, err = train.communicate(timeout=30)
    assert train.returncode == 130
    assert err == (
        "\nstopping after this step, then saving; Ctrl-C again to stop at once\nstopped at once\n"
        f"nothing saved since step 2; to go on from there: meshwright train --resume {run_folder}\n"
    )
    assert json.loads(run("explain", run_folder, "--json").stdout)["ending"].startswith("cut short")
    nothing_left(tmp_path)


def with_this(folder: Path) -> str:
    """A PYTHONPATH with a folder in front."""
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


CRASH = """
import os, threading, time

def arm():
    from meshwright.train import loop
    set_learning_rate = loop.set_learning_rate
    def failing(optimizer, step, job):
        if step == 3 and os.environ.get("RANK") == "1":
            raise RuntimeError("boom on purpose")
        return set_learning_rate(optimizer, step, job)
    loop.set_learning_rate = failing

import importlib.abc, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "meshwright.train.worker":
            sys.meta_path.remove(self)
            arm()
        return None

sys.meta_path.insert(0, Finder())
"""


def test_a_crash_is_told_once_with_its_rank(tmp_path: Path) -> None:
    # A module that Python imports by itself at the start of every process.
    (tmp_path / "sitecustomize.py").write_text(CRASH)
    job = write_job(tmp_path)
    began = time.monotonic()
    train = run("train", job, MARK=str(tmp_path), PYTHONPATH=with_this(tmp_path))
    assert time.monotonic() - began < 40
    assert train.returncode == 1
    assert train.stderr.startswith("rank 1 failed:\nTraceback"), train.stderr
    assert train.stderr.count("Traceback") == 1
    word, saved = train.stderr.splitlines()[-2:]
    assert word == "rank 1 failed: RuntimeError: boom on purpose"
    assert saved == f"nothing saved yet; to begin again: meshwright train --resume {tmp_path / 'runs' / 'tiny'}"
    assert [step for step, _ in losses_of(tmp_path / "runs" / "tiny")] == [0, 1, 2]
    nothing_left(tmp_path)


def ranks_of(folder: Path) -> list[int]:
    """Process ids of the ranks: what multiprocessing spawned, resource trackers apart."""
    return sorted(pid for pid, words in processes_of(folder).items() if "spawn_main" in words)


def test_a_killed_rank_is_named_with_its_signal(tmp_path: Path) -> None:
    job = write_job(tmp_path, run=ENDLESS | {"folder": str(tmp_path / "runs")})
    with running("train", job, MARK=str(tmp_path)) as train:
        wait_until(lambda: lines_in(tmp_path / "runs/tiny/metrics.jsonl") > 2, train)
        os.kill(ranks_of(tmp_path)[1], signal.SIGKILL)
        _, err = train.communicate(timeout=40)
    assert train.returncode == 128 + signal.SIGKILL
    assert re.search(r"^rank [01] was killed by SIGKILL \(often the system, out of memory\)$", err, re.MULTILINE), err
    assert "Traceback" not in err
    assert f"to begin again: meshwright train --resume {tmp_path / 'runs' / 'tiny'}" in err
    nothing_left(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="a parent's death is told to its child on Linux only")
def test_a_killed_command_leaves_nothing_behind(tmp_path: Path) -> None:
    job = write_job(tmp_path, run=ENDLESS | {"folder": str(tmp_path / "runs")})
    with running("train", job, MARK=str(tmp_path)) as train:
        wait_until(lambda: lines_in(tmp_path / "runs/tiny/metrics.jsonl") > 2, train)
        assert len(ranks_of(tmp_path)) == 2
        train.kill()
        train.wait(timeout=10)
        nothing_left(tmp_path, within_s=20)


def torchrun(ranks: int, job: Path) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run(
        [*launcher, "-m", "meshwright", "train", str(job)],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
        env=environment(MARK=str(job.parent), OMP_NUM_THREADS="1"),
    )


def test_an_external_torchrun_is_joined(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    joined = torchrun(2, job)
    assert joined.returncode == 0, joined.stderr
    run_folder = RunFolder(tmp_path / "runs" / "tiny")
    assert [step for step, _ in losses_of(run_folder.path)] == list(range(6))
    assert run_folder.ranks(0) == [0, 1] and run_folder.attempt_numbers() == [0]
    assert run("explain", run_folder.path).returncode == 0
    nothing_left(tmp_path)


def test_ranks_of_an_external_torchrun_have_their_tokens_before_they_wait_for_one_another(tmp_path: Path) -> None:
    """Tokenising may take longer than a process group waits for its slowest rank."""
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from meshwright.cli.machine import local\n"
        "from meshwright.spec import SettingError\n"
        "from meshwright.spec.decode import read_job\n"
        "from meshwright.train.worker import join_ranks\n"
        "def begin():  # what rank 0 does first, once all have joined\n"
        "    raise SettingError('tokens', str(len(list(Path(sys.argv[2]).glob('*/tokens.bin')))))\n"
        "join_ranks(read_job(Path(sys.argv[1]), local=local), begin, print, time.time())\n"
    )
    group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    command = [sys.executable, "-c", script, write_job(tmp_path, ranks=1), tmp_path / "tokens"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment() | group)
    assert ended.returncode == 2 and ended.stderr.endswith("error: tokens: 1\n"), ended.stderr


@pytest.mark.slow
def test_an_external_torchrun_with_other_ranks_is_refused(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    refused = torchrun(1, job)
    assert refused.returncode != 0
    assert "error: layout of 2 ranks: torchrun started 1; nearest that works: torchrun --nproc-per-node 2" in (
        refused.stderr
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_refused_data_is_one_line_and_the_mended_job_runs(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    text = tmp_path / "text"
    shutil.move(text, tmp_path / "aside")

    def refused(ranks: int) -> str:
        train = run("train", job, "--set", f"layout.shard={ranks}", MARK=str(tmp_path))
        assert train.returncode == 2, train.stderr
        assert train.stderr.startswith("error: ") and train.stderr.count("\n") == 1, train.stderr
        assert not (tmp_path / "runs" / "tiny").exists()
        return train.stderr

    assert f'data.path = "{text}": no such file or folder' in refused(1)
    text.mkdir()
    assert f'data.path = "{text}": holds no .txt, .jsonl or .parquet file' in refused(2)
    text.rmdir()
    shutil.move(tmp_path / "aside", text)
    assert run("train", job, "--set", "layout.shard=1", MARK=str(tmp_path)).returncode == 0

    # The same job under another name, its tokens cut short meanwhile.
    tokens = next((tmp_path / "tokens").glob("*/tokens.bin"))
    os.truncate(tokens, 1000)
    job.write_text(job.read_text().replace('name = "tiny"', 'name = "second"'))
    cut = run("train", job, "--set", "layout.shard=1", MARK=str(tmp_path))
    assert cut.returncode == 2 and cut.stderr.count("\n") == 1, cut.stderr
    assert "tokens.bin has 1000 bytes where manifest.json says" in cut.stderr
    assert "remove the folder and prepare it again" in cut.stderr
    assert not (tmp_path / "runs" / "second").exists()
    nothing_left(tmp_path)


def test_spans_cover_the_life_of_a_rank(finished: tuple[Path, object]) -> None:
    for lines in read_events(RunFolder(finished[0]), 0).values():
        spans = [line for line in lines if isinstance(line, Span)]
        names = [span.name for span in spans]
        assert names[0] == "startup" and {"evaluation", "step", "measurement", "checkpoint"} <= set(names)
        assert sum(span.count for span in spans if span.name == "step") == 8
        for one, two in pairwise(spans):
            assert one.end_s <= two.start_s + 1e-3
        assert msgspec.structs.asdict(lines[-1])["how"] == "finished"


def test_a_refused_resume_leaves_the_job_as_it_was(finished: tuple[Path, object]) -> None:
    folder = finished[0]
    before = (folder / "job.toml").read_text()
    refused = run("train", "--resume", folder, "--set", "run.steps=99", "--set", "cluster.gpus=64xh100")
    assert refused.returncode == 2 and "this machine has no GPU" in refused.stderr
    assert (folder / "job.toml").read_text() == before
