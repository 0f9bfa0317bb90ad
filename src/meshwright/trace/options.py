"""What record() may be told, checked before anything begins."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
from torch import nn
from torch.optim import Optimizer

from meshwright.account import PURPOSES, Purpose
from meshwright.record import RunFolder
from meshwright.spec import Precision, SettingError
from meshwright.spec.errors import nearest_choice

DEFAULT_BUDGET = 0.005
LARGEST_BUDGET = 0.5
# Of whole programs: fp8 is of some of a program's products alone, so its FLOPs have no one peak.
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """See record()."""

    name: str
    trainer: str
    flops_per_step: float | None
    tokens_per_step: int | None
    precision: Precision | None
    groups: Mapping[str, Purpose]
    budget: float
    every_steps: int | None
    keep_traces: bool
    first_step: int


def check_options(folder: RunFolder, given: Mapping[str, Any]) -> Options:
    """The options as given; raises SettingError for one that cannot be honoured."""
    for name in ("flops_per_step", "tokens_per_step"):
        if (value := given[name]) is not None and not (is_number(value) and value > 0):
            raise SettingError(f"{name}={value!r}", "must be a number above 0", f"{name}=None, where it is not known")
    budget, every, first = given["budget"], given["every_steps"], given["first_step"]
    if budget is not None and every is not None:
        raise SettingError("budget", "cannot stand beside every_steps, which sets how often", "one of the two")
    if budget is not None and not (is_number(budget) and 0 < budget <= LARGEST_BUDGET):
        reason = f"must be a share of the time, above 0 and at most {LARGEST_BUDGET}"
        raise SettingError(f"budget={budget!r}", reason, f"budget={DEFAULT_BUDGET}, or every_steps=0 for no samples")
    for name, value in (("every_steps", every or 0), ("first_step", first)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise SettingError(f"{name}={value!r}", "must be a whole number, at least 0", f"{name}=0")
    if (precision := given["precision"]) is not None and precision not in PRECISIONS:
        reason = "is no precision that the hardware table has peaks for"
        raise SettingError(f"precision={precision!r}", reason, nearest_choice("precision", precision, PRECISIONS))
    groups = given["groups"] or {}
    for group, purpose in groups.items():
        if purpose not in PURPOSES:
            setting = f"groups[{group!r}]"
            raise SettingError(f"{setting} = {purpose!r}", "is no purpose", nearest_choice(setting, purpose, PURPOSES))
    tokens = given["tokens_per_step"]
    return Options(
        name=given["name"] or folder.path.name,
        trainer=given["trainer"],
        flops_per_step=given["flops_per_step"],
        precision=given["precision"],
        tokens_per_step=None if tokens is None else int(tokens),
        groups=dict(groups),
        budget=DEFAULT_BUDGET if budget is None else budget,
        every_steps=every,
        keep_traces=bool(given["keep_traces"]),
        first_step=first,
    )


def is_number(value: object) -> bool:
    """A finite one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def all_of(what: str, given: object, kind: type[Any]) -> list[Any]:
    """One thing, several, or None, as a list; raises SettingError for anything else."""
    several = given if isinstance(given, Sequence) else [] if given is None else [given]
    for each in cast(Sequence[object], several):
        if not isinstance(each, kind):
            reason = f"is a {type(each).__name__}, not a torch {kind.__name__}"
            raise SettingError(f"record({what})", reason, f"the {kind.__name__} of the loop")
    return list(several)


def models_of(given: object) -> list[nn.Module]:
    """The model, or a pipeline's parts of it on this rank."""
    return all_of("model", given, nn.Module)


def optimizers_of(given: object) -> list[Optimizer]:
    """The optimizer, or several."""
    return all_of("optimizer", given, Optimizer)


def check_folder(folder: RunFolder) -> None:
    """Raises SettingError where no run of another program can be recorded into."""
    path = folder.path
    if folder.job.is_file():
        raise SettingError(
            f"run folder {path}", "holds a run of meshwright train", str(Path(path).with_name(f"{path.name}-2"))
        )
    if path.exists() and not path.is_dir():
        raise SettingError(f"run folder {path}", "is a file", str(path.with_name(f"{path.name}-run")))
