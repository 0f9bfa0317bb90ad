"""Where recording any PyTorch program begins."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from meshwright.account import Purpose
from meshwright.record import RunFolder, start_attempt
from meshwright.record.process import process_start_s
from meshwright.spec import Precision, SettingError
from meshwright.trace.meeting import Meeting
from meshwright.trace.options import check_folder, check_options, models_of, optimizers_of
from meshwright.trace.recording import Recording


def record(
    run: str | os.PathLike[str],
    model: nn.Module | Sequence[nn.Module] | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    name: str = "",
    trainer: str = "a PyTorch loop",
    flops_per_step: float | None = None,
    tokens_per_step: int | None = None,
    precision: Precision | None = None,
    groups: Mapping[str, Purpose] | None = None,
    budget: float | None = None,
    every_steps: int | None = None,
    keep_traces: bool = False,
    first_step: int = 0,
) -> Recording:
    """Begin to record this rank's training into the run folder `run`. Every rank calls it, after init_process_group.

    model, optimizer: what is trained, and by what, for the memory account and the count of parameters.
    name, trainer: in words, for people.
    flops_per_step: model FLOPs of one step, all ranks together, forward and backward; None: counted in the second step,
        but in a program that torch.compile has compiled, whose count would be wrong.
    tokens_per_step: of all ranks. precision: of most matrix products; None: as counted.
    groups: purposes of process groups by their descriptions ("replica", "tensor", ...), where you know better.
    budget: the share of the time that sampled steps may cost (0.005). every_steps: a sample each so many steps instead;
        0: none. keep_traces: keep the profiler's traces in the run folder.
    first_step: the number of the first step, of a training that resumes.

    Raises SettingError where an option or the folder cannot be used. After that nothing is ever raised into the
    program: what recording fails at is a fault in the record.
    """
    began_s = process_start_s()
    folder = RunFolder(Path(run))
    options = check_options(folder, locals())
    models, optimizers = models_of(model), optimizers_of(optimizer)
    meeting = Meeting()
    attempt = agree_on_attempt(folder, meeting)
    return Recording(folder, attempt, options, meeting, models, optimizers, began_s=began_s)


def agree_on_attempt(folder: RunFolder, meeting: Meeting) -> int:
    """The number of the attempt, which rank 0 begins; where it cannot, all ranks say why."""
    if meeting.rank != 0:
        word = meeting.wait("attempt")
        if word.isdecimal():
            return int(word)
        raise SettingError(*word.split("\n"))
    try:
        check_folder(folder)
        attempt = start_attempt(folder, None)
    except SettingError as error:
        meeting.tell("attempt", f"{error.setting}\n{error.reason}\n{error.nearest}")
        raise
    except OSError as error:
        refused = SettingError(f"run folder {folder.path}", f"cannot be made ({error.strerror})", "runs/mine")
        meeting.tell("attempt", f"{refused.setting}\n{refused.reason}\n{refused.nearest}")
        raise refused from None
    meeting.tell("attempt", str(attempt))
    return attempt
