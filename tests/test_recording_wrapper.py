"""A program that is not changed is recorded by `python -m meshwright.trace`, and runs as it would without."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from loops import Read, build, step_flops

from meshwright.record import Ended, Memory, Step
from meshwright.spec import SettingError
from meshwright.trace.wrapper import check_program

# The options of someone who gives none.
NOTHING = {
    **dict.fromkeys(("budget", "every_steps", "flops_per_step", "groups", "precision", "tokens_per_step")),
    "first_step": 0,
    "keep_traces": False,
    "name": "",
    "trainer": "train.py",
}

# Knows nothing of Meshwright. What it is given says how it ends.
PROGRAM = """
import json, os, signal, sys, time
import torch
import torch.distributed as dist
from loops import batches, build, update
from torch.nn.parallel import DistributedDataParallel

def main(steps, ending):
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    model = build()
    if dist.is_initialized():
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step, batch in enumerate(batches(int(steps))):
        update(model, optimizer, batch)
        if step == 19:
            # By then the recorder's thread has written what came before.
            time.sleep(2)
            if ending == "raise":
                raise ValueError("mine")
            if ending == "exit":
                sys.exit(3)
            if ending == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if ending == "interrupt":
                print("ready", flush=True)
                time.sleep(60)
    print(json.dumps([sys.argv, __name__, sys.path[0]]))
    if dist.is_initialized():
        # Gloo's threads still drop what backward passes gave them, with Python's lock (torch 2.13 stashes a context for
        # each). Who held it and joined them, as a model's end does, would wait forever; asleep, nobody holds it.
        time.sleep(1)
        dist.destroy_process_group()

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """Its script, which is a module of a package too."""
    path = tmp_path / "mine" / "train.py"
    path.parent.mkdir()
    path.write_text(PROGRAM)
    (path.parent / "__init__.py").touch()
    return path


def start(tmp_path: Path, *words: str) -> subprocess.Popen[str]:
    """A process of Python with these words."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wrapped(tmp_path: Path, run: str, *words: str) -> subprocess.Popen[str]:
    """The same behind the wrapper."""
    return start(tmp_path, "-m", "meshwright.trace", "--record", run, *words)


def test_a_script_runs_as_it_would_and_is_recorded(tmp_path: Path, program: Path) -> None:
    both = [start(tmp_path, str(program), "12", "done"), wrapped(tmp_path, "run", str(program), "12", "done")]
    (plain, _), (recorded, said) = (process.communicate(timeout=100) for process in both)
    assert [process.returncode for process in both] == [0, 0], said
    assert json.loads(recorded) == json.loads(plain) == [[str(program), "12", "done"], "__main__", str(program.parent)]
    run = Read(tmp_path / "run")
    # The first step is start-up.
    assert [line.step for line in run.metrics] == list(range(11))
    assert run.program.flops_per_step == step_flops() and run.faults() == []
    assert run.program.parameters == sum(p.numel() for p in build().parameters())
    assert len(run.of(Step)) == len(run.of(Memory)) == 1
    assert [line.how for line in run.of(Ended)] == ["finished"]


def values_in(printed: str) -> list[Any]:
    """JSON values one after the other: two processes that print at once may both do so before either ends its line."""
    values: list[Any] = []
    while printed := printed.lstrip():
        value, end = json.JSONDecoder().raw_decode(printed)
        values.append(value)
        printed = printed[end:]
    return values


@pytest.mark.usefixtures("program")
def test_a_module_is_recorded_on_every_rank_of_torchrun(tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "meshwright.trace"]
    process = start(tmp_path, *launcher, "--record=run", "--name", "titan", "-m", "mine.train", "12", "done")
    printed, said = process.communicate(timeout=100)
    assert process.returncode == 0, said
    told = values_in(printed)
    assert len(told) == 2
    for (script, *words), name, _ in told:
        assert script.endswith("mine/train.py") and (words, name) == (["12", "done"], "__main__")
    run = Read(tmp_path / "run")
    assert set(run.ranks) == {0, 1} and run.faults() == []
    assert (run.program.name, run.program.trainer, run.program.world_size) == ("titan", "mine.train", 2)
    for rank in run.ranks:
        (step,) = run.of(Step, rank)
        assert {transfer.purpose for transfer in step.measured.transfers} == {"replica"}


def test_a_package_that_reads_its_arguments_at_import_gets_its_own(tmp_path: Path) -> None:
    """torchtitan's does; to see whether there is such a module its package is imported."""
    package = tmp_path / "early"
    package.mkdir()
    (package / "__init__.py").write_text("import sys\nARGUMENTS = sys.argv[1:]\n")
    (package / "go.py").write_text("from early import ARGUMENTS\nprint(ARGUMENTS)\n")
    words = ["-m", "meshwright.trace", "--record", "run", "-m", "early.go", "--of-its-own", "7"]
    found = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert found.stdout == "['--of-its-own', '7']\n", found.stderr


def test_however_it_ends_its_steps_are_there(tmp_path: Path, program: Path) -> None:
    endings = {"raise": 1, "exit": 3, "kill": -signal.SIGKILL, "interrupt": -signal.SIGINT}
    processes = {ending: wrapped(tmp_path, ending, str(program), "40", ending) for ending in endings}
    interrupted = processes["interrupt"]
    assert interrupted.stdout is not None and interrupted.stdout.readline() == "ready\n"
    time.sleep(0.1)
    interrupted.send_signal(signal.SIGINT)
    for ending, process in processes.items():
        _, said = process.communicate(timeout=100)
        assert process.returncode == endings[ending], said
        run = Read(tmp_path / ending)
        # The first is start-up.
        assert [line.step for line in run.metrics] == list(range(19)), ending
        assert len(run.of(Memory)) == 1 and run.of(Ended) == []
        faults = {"raise": ["ValueError: mine"], "exit": ["SystemExit: 3"], "interrupt": ["KeyboardInterrupt"]}
        assert run.faults() == faults.get(ending, [])
        if ending in ("raise", "interrupt"):
            assert said.rstrip().splitlines()[-1] == ("ValueError: mine" if ending == "raise" else "KeyboardInterrupt")


def test_what_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    lines = {
        ("-m", "absent.train"): "error: -m absent.train: is no module that Python finds here and can run; ",
        ("--every-steps", "x", "train.py"): "Error: Invalid value for '--every-steps': 'x' is not a valid integer.",
    }
    processes = {words: wrapped(tmp_path, "run", *words) for words in lines}
    for words, process in processes.items():
        _, said = process.communicate(timeout=100)
        assert process.returncode == 2 and lines[words] in said.splitlines()[-1] and "Traceback" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("program", "options", "line"),
    [
        ([], {}, "meshwright.trace: is given no program; nearest that works: --record runs/mine train.py"),
        (["-m"], {}, "is given no program"),
        (["absent.py"], {}, "absent.py: is no file"),
        (["-m", "collections"], {}, "-m collections: is no module that Python finds here and can run"),
        ([__file__], {"budget": 0.9}, "budget=0.9: must be a share of the time"),
        ([__file__], {"groups": {"mine": "tensr"}}, "groups['mine'] = 'tensr': is no purpose"),
        ([__file__], {"every_steps": 3, "budget": 0.1}, "budget: cannot stand beside every_steps"),
    ],
)
def test_it_is_refused_before_the_program_begins(
    tmp_path: Path, program: list[str], options: dict[str, Any], line: str
) -> None:
    with pytest.raises(SettingError) as refused:
        check_program(tmp_path / "run", {**NOTHING, **options}, program)
    assert line in str(refused.value) and not (tmp_path / "run").exists()
