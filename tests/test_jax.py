"""JAX loops recorded from outside their compiled programs, and explained; their traces read back."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from xla_traces import read_xla

import meshwright as mw
from meshwright.account import PURPOSES
from meshwright.explain import Explanation, explain_run
from meshwright.record import (
    Ended,
    Event,
    Fault,
    Program,
    Span,
    Step,
    open_run,
    read_events,
    read_metrics,
    read_program,
)
from meshwright.record.kineto.xla import measure_xla_trace
from meshwright.report.html import report_html

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "JAX_PLATFORMS": "cpu"}
# Devices that the programs see.
DEVICES = 4


def run(program: str, *arguments: object) -> None:
    """Run a JAX program to its end."""
    command = [sys.executable, "-W", "error", str(ROOT / program), *map(str, arguments)]
    finished = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the programs have left their runs."""
    folder = tmp_path_factory.mktemp("jax")
    run("tests/jax_programs.py", folder)
    return folder


def events_of(folder: Path, attempt: int = 0) -> list[Event]:
    return read_events(open_run(folder), attempt)[0]


def steps_of(folder: Path) -> list[Step]:
    return [line for line in events_of(folder) if isinstance(line, Step)]


def faults_of(folder: Path) -> list[str]:
    return [line.what for line in events_of(folder) if isinstance(line, Fault)]


def spans_of(folder: Path, name: str) -> list[Span]:
    return [line for line in events_of(folder) if isinstance(line, Span) and line.name == name]


def program_of(folder: Path) -> Program:
    program = read_program(open_run(folder))
    assert program is not None
    return program


def explained(folder: Path) -> Explanation:
    return explain_run(open_run(folder))


def test_late_batches_and_a_late_host_are_measured_at_their_size(programs: Path):
    steps = steps_of(programs / "delayed")
    assert [one.measured.step for one in steps] == [10, 20, 30, 40]
    slept = json.loads((programs / "slept.json").read_text())
    for one in steps:
        account = one.measured.account
        assert account.input == pytest.approx(slept["input"][one.measured.step], rel=0.3)
        assert account.host == pytest.approx(slept["host"][one.measured.step], rel=0.3)
        assert account.unseen > 0
        assert account.closes(one.measured.wall_s)
        assert one.detail is not None
        waited, late = one.detail.gaps[:2]
        assert (waited.bucket, waited.doing) == ("input", "a wait for a batch")
        assert (late.bucket, late.doing) == ("host", "the loop, before the program")
        assert late.before == "train_step"
        assert sum(one.detail.host.values()) == pytest.approx(account.host)


def test_what_the_device_does_meanwhile_hides_the_wait_for_a_batch(programs: Path):
    (one,) = steps_of(programs / "ahead")
    # Of what each wait took. The program takes ten times as long.
    assert one.measured.account.input < 0.5 * 0.01
    assert one.measured.account.unseen > 0.9 * one.measured.wall_s


def test_nothing_inside_a_program_is_guessed(programs: Path):
    for name in ("delayed", "ahead"):
        for one in steps_of(programs / name):
            account = one.measured.account
            assert account.compute == account.optimizer == account.recompute == 0
            assert [getattr(account, f"comm_{purpose}") for purpose in PURPOSES] == [0] * len(PURPOSES)


def test_compiling_is_no_part_of_a_step_and_compiling_again_is_named(programs: Path):
    folder = programs / "delayed"
    compiling = spans_of(folder, "compile")
    assert {span.step for span in compiling} == {0, 1, 15}
    (fault,) = faults_of(folder)
    assert fault.startswith("train_step was compiled again in step 15, which took ")
    metrics, _ = read_metrics(open_run(folder))
    assert [line.step for line in metrics] == list(range(41))
    plain = metrics[14].step_s
    assert metrics[15].step_s < plain + 0.5 * sum(span.end_s - span.start_s for span in compiling if span.step == 15)


def test_an_evaluation_stands_outside_of_steps(programs: Path):
    folder = programs / "delayed"
    (span,) = spans_of(folder, "evaluation")
    assert span.end_s - span.start_s >= 0.2
    metrics, _ = read_metrics(open_run(folder))
    # It came after the step in whose body it stands.
    assert metrics[36].step_s < metrics[34].step_s + 0.1
    life = explained(folder).life.account
    assert life.evaluation == pytest.approx(span.end_s - span.start_s)
    assert life.compile > 0 and life.startup > 0
    paid = life.total()
    assert life.idle < 0.05 * paid


def test_the_program_says_what_it_is_and_counts_its_flops(programs: Path):
    program = program_of(programs / "delayed")
    assert (program.name, program.kind, program.world_size) == ("late", "cpu", 1)
    assert program.trainer == f"a JAX loop, {DEVICES} devices a process"
    assert set(program.versions) == {"jax", "jaxlib"}
    # x @ w and (...) @ w.T forward; backward the gradients of w in both, and of what comes between them.
    assert program.flops_per_step == 5 * 2 * 32 * 64 * 128 / DEVICES
    assert program.precision == "fp32" and program.peak_flops_per_s is None
    metrics, _ = read_metrics(open_run(programs / "delayed"))
    assert metrics[20].tokens_per_s == pytest.approx(32 * 8 / metrics[20].step_s)
    assert metrics[0].loss is not None and metrics[20].loss is not None and metrics[20].loss < metrics[0].loss


def test_without_a_loader_steps_are_ended_by_hand(programs: Path):
    folder = programs / "handed"
    assert program_of(folder).flops_per_step == 4e6 / DEVICES
    for attempt in (0, 1):
        events = events_of(folder, attempt)
        ended = [line for line in events if isinstance(line, Ended)]
        assert [(line.step, line.how) for line in ended] == [(113, "stopped")]
        spans = [line for line in events if isinstance(line, Span) and line.name == "step"]
        assert [(span.step, span.count) for span in spans] == [(113, 14)]
    metrics, _ = read_metrics(open_run(folder))
    assert metrics[-1].attempt == 1 and metrics[-1].loss is not None


def test_a_step_that_shows_nothing_says_how_it_would(programs: Path):
    folder = programs / "blind"
    assert faults_of(folder) == [
        "no program of the step is watched, so its parts are not known: recorder.watch(train_step)"
    ]
    assert steps_of(folder) == []
    # The loop was left after six steps of two batches and one more batch. Nobody closed the record.
    assert [span.count for span in spans_of(folder, "step")] == [6]
    assert not any(isinstance(line, Ended) for line in events_of(folder))


def test_a_crash_loses_only_the_end(programs: Path):
    folder = programs / "crashed"
    assert faults_of(folder) == ["RuntimeError: out of luck"]
    assert [span.count for span in spans_of(folder, "step")] == [11]
    assert explained(folder).ending.startswith("still running, or killed")


def test_what_cannot_be_asked_for_is_refused_in_a_line(programs: Path):
    lines = json.loads((programs / "refused.json").read_text())
    starts = (
        f"run folder {programs / 'ours'}: is a run that meshwright train made",
        f"run folder {programs / 'file'}: cannot be made",
        "budget=2: must lie between 0 and 1",
        "tokens_per_step=0: ",
        "flops_per_step=inf: ",
        "first_step=-1: ",
        "microbatches=0: ",
        'span("evaluating"): is no stretch of a run; nearest that works: name = "evaluation"',
        "watch(3): is no function",
    )
    assert len(lines) == len(starts)
    assert [line for line, start in zip(lines, starts, strict=True) if not line.startswith(start)] == []
    assert not (programs / "x").exists()


@pytest.mark.parametrize("name", ["marked", "bare"])
def test_a_trace_of_four_devices_is_read_back(programs: Path, name: str):
    found = measure_xla_trace(read_xla(programs / name))
    slept = json.loads((programs / "profiled.json").read_text())
    assert list(found.devices) == list(range(DEVICES))
    for device, steps in found.devices.items():
        assert [(one.measured.step, one.measured.rank) for one in steps] == [(number, device) for number in (1, 2, 3)]
        for one in steps:
            account = one.measured.account
            assert account.closes(one.measured.wall_s) and account.other < 1e-9
            # The device is done some time into the sleep, and a busy machine lets it be late.
            assert account.input == pytest.approx(slept[one.measured.step], rel=0.4)
            assert account.compute > 0 and account.unseen > 0
            assert one.detail is not None
            purposes = {group.purpose for group in one.detail.kernels}
            assert {"communication", "matrix products"} <= purposes
            assert one.detail.gaps[0].bucket == "input"
    assert bool(found.notes) == (name == "bare")
    told = measure_xla_trace(read_xla(programs / name), purposes={"all-reduce": "replica"})
    account = told.devices[0][-1].measured.account
    assert account.comm_replica > 0 and account.closes(told.devices[0][-1].measured.wall_s)


@pytest.mark.parametrize("name", ["marked", "bare"])
def test_a_trace_is_explained_from_the_folder_that_jax_was_told(programs: Path, name: str):
    explanation = mw.explain(programs / name, purposes={"all-reduce": "replica"})
    assert explanation.name == name and explanation.ranks == tuple(range(DEVICES))
    slept = json.loads((programs / "profiled.json").read_text())
    step = explanation.step
    assert step is not None and step.steps == (1, 2, 3) and step.closes
    assert step.account.input == pytest.approx(sum(slept[1:4]) / 3, rel=0.4)
    assert step.account.comm_replica > 0
    advice = explanation.advice[0]
    assert advice.cause == "input" and "jax.device_put" in advice.what
    assert advice.gain_s == pytest.approx(step.account.input, rel=0.05)
    assert "JAX profiler on 4 x CPU device" in report_html(explanation)


def test_processes_write_one_attempt_and_the_late_one_is_seen(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = ROOT / "tests" / "jax_processes.py"
    commands = [[sys.executable, str(script), str(number), str(port), str(tmp_path / "two")] for number in (0, 1)]
    started = [
        subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    ends = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], ends
    explanation = explained(tmp_path / "two")
    assert explanation.ranks == (0, 1) and explanation.attempts == 1
    step = explanation.step
    assert step is not None and step.steps == (10,) and step.closes
    # The second process waits for the first one's batch inside of its program, where nobody sees what it does.
    assert step.ranks[0].input > 0.5 * step.wall_s
    assert step.ranks[1].input < 0.1 * step.wall_s and step.ranks[1].unseen > 0.5 * step.wall_s
    assert len(refusals := (tmp_path / "refused.txt").read_text().splitlines()) == 2
    assert all("run folder" in line for line in refusals)


def test_the_example_is_explained(tmp_path: Path):
    folder = tmp_path / "loop"
    run("examples/jax_loop.py", folder)
    explanation = explained(folder)
    assert explanation.ending == "finished"
    first, last = explanation.metrics[0].loss, explanation.metrics[-1].loss
    assert first is not None and last is not None and last < 0.5 * first
    assert explanation.step is not None
    assert explanation.step.account.share("unseen") > 0.5
    assert "torch" not in " ".join(advice.what for advice in explanation.advice)
    assert "in a compiled program that shows no parts" in report_html(explanation)
    # Forward and backward of 2 layers of 12 matrices' worth of 64 x 64, attention over 64 tokens, and the output.
    tokens, width = 16 * 64, 64
    forward = 2 * (2 * 12 * width**2 + 2 * 2 * 64 * width + width * 128) * tokens
    assert program_of(folder).flops_per_step == 3 * forward / DEVICES
