"""Recording a program that is not changed: its steps are found by torch's hooks around every optimizer's step."""

import runpy
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from meshwright.record import RunFolder
from meshwright.spec import SettingError
from meshwright.trace.options import check_folder, check_options
from meshwright.trace.recording import Recording
from meshwright.trace.start import record


class Follower:
    """Records from the first optimizer step on, whose end is the first boundary: the step before it is start-up.

    The first optimizer that steps leads. One that holds others, as torchtitan's does, is an optimizer itself, so only
    the outermost call counts.
    """

    def __init__(self, run: Path, options: Mapping[str, Any]) -> None:
        self._run = run
        self._options = options
        self._recording: Recording | None = None
        self._leader: Optimizer | None = None
        self._seen: list[Optimizer] = []
        self._depth = 0
        self._refused = False

    def __enter__(self) -> "Follower":
        self._hooks = [
            register_optimizer_step_pre_hook(self._enter_step),
            register_optimizer_step_post_hook(self._leave_step),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._recording is None:
            if kind is None and not self._refused:
                print(f"meshwright: {self._run}: nothing was recorded, for no optimizer stepped", file=sys.stderr)
        elif isinstance(error, SystemExit) and not error.code:
            self._recording.close()
        else:
            self._recording.__exit__(kind, error, traceback)

    def _enter_step(self, _optimizer: Optimizer, _arguments: Any, _options: Any) -> None:
        self._depth += 1

    def _leave_step(self, optimizer: Optimizer, _arguments: Any, _options: Any) -> None:
        self._depth -= 1
        if self._recording is not None:
            if self._depth == 0 and optimizer is self._leader:
                self._recording.next_step()
            return
        if optimizer.state:
            self._seen.append(optimizer)
        if self._depth == 0 and not self._refused:
            self._leader = optimizer
            self._begin()

    def _begin(self) -> None:
        """Whatever is wrong is said, and the program goes on."""
        try:
            self._recording = record(self._run, None, self._seen or self._leader, **self._options)
        except Exception as error:
            self._refused = True
            print(f"meshwright: not recorded: {error}", file=sys.stderr)


def check_program(run: Path, options: Mapping[str, Any], program: Sequence[str]) -> None:
    """Raises SettingError where options, folder or program cannot be used."""
    if not program or program == ["-m"]:
        raise SettingError("meshwright.trace", "is given no program", "--record runs/mine train.py")
    check_options(RunFolder(run), options)
    check_folder(RunFolder(run))
    if program[0] == "-m":
        if not can_be_run(program[1]):
            reason = "is no module that Python finds here and can run"
            raise SettingError(f"-m {program[1]}", reason, "-m and a name that python -m would run, or a script's path")
    elif not Path(program[0]).is_file():
        raise SettingError(program[0], "is no file", "the path of a Python script, or -m and the name of a module")


def arguments_of(program: Sequence[str]) -> list[str]:
    """The program's sys.argv."""
    return list(program[1:] if program and program[0] == "-m" else program)


def can_be_run(module: str) -> bool:
    """Whether `python -m` would. What a package of it raises when it is imported is raised."""
    try:
        found = find_spec(module)
        if found is not None and found.submodule_search_locations is not None:
            found = find_spec(f"{module}.__main__")
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        return False
    except ValueError:
        # An empty name, or a module that is running.
        return False
    return found is not None


def run_program(run: Path, options: Mapping[str, Any], program: Sequence[str]) -> None:
    """Run `-m module arguments...` or `script.py arguments...` as Python itself would, recorded into `run`."""
    with Follower(run, options):
        sys.argv = arguments_of(program)
        if program[0] == "-m":
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            # In place of the folder of this package's caller, as Python does for a script.
            sys.path[0] = str(Path(program[0]).resolve().parent)
            runpy.run_path(program[0], run_name="__main__")
