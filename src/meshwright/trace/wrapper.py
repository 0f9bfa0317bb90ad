"""Recording a program that is not changed: its steps are found by torch's hooks around every optimizer's step."""

import runpy
import sys
from collections.abc import Mapping, Sequence
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


def run_program(run: Path, options: Mapping[str, Any], program: Sequence[str]) -> None:
    """Run `-m module arguments...` or `script.py arguments...` as Python itself would, recorded into `run`.

    Raises SettingError, before the program begins, where options, folder or program cannot be used.
    """
    module = program[1:2] if program[:1] == ["-m"] else []
    if not program or program == ["-m"]:
        raise SettingError("meshwright.trace", "is given no program", "--record runs/mine train.py")
    check_options(RunFolder(run), options)
    check_folder(RunFolder(run))
    if not module and not Path(program[0]).is_file():
        raise SettingError(program[0], "is no file", "the path of a Python script, or -m and the name of a module")
    with Follower(run, options):
        if module:
            sys.argv = [module[0], *program[2:]]
            runpy.run_module(module[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(program)
            # In place of the folder of this package's caller, as Python does for a script.
            sys.path[0] = str(Path(program[0]).resolve().parent)
            runpy.run_path(program[0], run_name="__main__")
