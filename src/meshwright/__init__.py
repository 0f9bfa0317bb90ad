"""Meshwright: plan how to spread the training of a transformer, train it that way, explain where the time went.

The three verbs of the command line, for notebooks: `import meshwright as mw`, then mw.plan, mw.train, mw.explain.
Importing this loads nothing but names; torch is loaded by training alone, in processes of its own.
"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from meshwright.explain import Explanation
    from meshwright.plan import Plan
    from meshwright.spec import Job

__version__ = "0.1.0"

__all__ = ["explain", "plan", "read_job", "train"]


def read_job(path: str | Path, settings: Sequence[str] = ()) -> "Job":
    """A job file, with settings like "run.steps=100" applied, resolved for this machine. Raises SettingError."""
    from meshwright.cli import read

    return read(Path(path), settings)


def plan(job: "Job") -> "Plan":
    """Predict the job's layout and the others that its cluster allows."""
    from meshwright.plan import build_plan

    return build_plan(job)


def train(job: "Job") -> Path:
    """Train the job on this machine and return its run folder. Raises SettingError, and RuntimeError if ranks fail."""
    from meshwright import launch
    from meshwright.cli import check_devices

    launch.needs_torch("train")
    check_devices(job.cluster)
    folder, attempt = launch.begin_attempt(None, job)
    code = launch.run_attempt(folder, attempt, time.time())
    if code:
        raise RuntimeError(f"training {folder.path} ended with exit code {code}; its ranks said why above")
    return folder.path


def explain(
    run: "str | Path | Sequence[str | Path]",
    *,
    flops_per_step: float | None = None,
    gpu: str | None = None,
    purposes: "Mapping[str, str] | None" = None,
) -> "Explanation":
    """Where the seconds of a run went, predicted against measured; or of traces: files, or a folder of them.

    flops_per_step, gpu: of traces, a rank's model FLOPs and its GPU in the hardware table ("h100"), both or neither.
    purposes: of traces, what process groups or XLA's collectives are for, by name ({"all-gather": "shard"}).
    Raises SettingError where `run` is neither.
    """
    from meshwright.explain import explain_paths

    paths = [run] if isinstance(run, str | Path) else run
    return explain_paths([Path(path) for path in paths], flops_per_step=flops_per_step, gpu=gpu, purposes=purposes)


VERBS: dict[str, Callable[..., Any]] = {"plan": plan, "train": train, "explain": explain}


class _Verb(ModuleType):
    """A package that is also the verb it is named after."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return VERBS[self.__name__.rpartition(".")[2]](*arguments, **options)


class _Meshwright(ModuleType):
    """Keeps the verbs callable: importing the package `meshwright.plan` would hide the function of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in VERBS and isinstance(value, ModuleType):
            value.__class__ = _Verb
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Meshwright
