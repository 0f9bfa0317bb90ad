"""Where recording a JAX program begins."""

import os
import time
from math import isfinite
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from meshwright.jax.book import Book
from meshwright.jax.program import describe_program
from meshwright.jax.recording import Recording
from meshwright.record import Program, RunFolder, start_attempt, write_program
from meshwright.record.folder import free_name
from meshwright.record.process import process_start_s
from meshwright.spec import SettingError


def record(
    run: str | os.PathLike[str],
    *,
    name: str = "",
    trainer: str = "a JAX loop",
    flops_per_step: float | None = None,
    tokens_per_step: int | None = None,
    budget: float = 0.005,
    first_step: int = 0,
) -> Recording:
    """Begin to record this process into the run folder `run`; a second start into the same folder is its next attempt.

    Every process of a program calls it, after jax.distributed.initialize.
    name, trainer: in words, for people; the folder's name, if not given.
    flops_per_step: model FLOPs of one step, all devices together, forward and backward; None: counted in the trace of
        the functions that are watched.
    tokens_per_step: of all processes. budget: the share of the steps' time that recording may take; steps shorter than
        it allows are looked at now and then. first_step: the number of the first step, of a training that resumes.

    Raises SettingError where an option or the folder cannot be used. After that nothing is ever raised into the
    program: what recording fails at is a fault in the record.
    """
    began_s = time.perf_counter() - (time.time() - process_start_s())
    path = Path(run)
    check_numbers(tokens_per_step, flops_per_step, budget, first_step)
    here = jax.local_device_count()
    program = describe_program(
        name or path.resolve().name,
        f"{trainer}, {here} devices a process" if here > 1 else trainer,
        tokens_per_step,
        flops_per_step,
    )
    folder = RunFolder(path)
    rank = jax.process_index()
    refused: SettingError | None = None
    attempt = -1
    if rank == 0:
        try:
            attempt = begin_attempt(folder, program)
        except SettingError as error:
            refused = error
    if program.world_size > 1:
        # All must write into the attempt that the first one made.
        attempt = int(multihost_utils.broadcast_one_to_all(np.int32(attempt)))
    if refused is not None:
        raise refused
    if attempt < 0:
        raise SettingError(f"run folder {path}", "cannot be used, as process 0 says", "another folder")
    try:
        book = Book(folder, attempt, program, rank=rank, began_s=began_s, budget=budget, first_step=first_step)
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
        raise SettingError(f"run folder {path}", reason, "a folder that all processes share") from None
    return Recording(book)


def check_numbers(tokens_per_step: Any, flops_per_step: Any, budget: Any, first_step: Any) -> None:
    """Refuse what would make numbers of the record wrong without anybody noticing."""
    if tokens_per_step is not None and (not is_amount(tokens_per_step) or tokens_per_step != int(tokens_per_step)):
        raise SettingError(f"tokens_per_step={tokens_per_step!r}", "must be a whole number above 0", "batch * sequence")
    if flops_per_step is not None and not is_amount(flops_per_step):
        nearest = "flops_per_step=None, by which they are counted"
        raise SettingError(f"flops_per_step={flops_per_step!r}", "must be a number above 0", nearest)
    if not is_amount(budget) or budget >= 1:
        raise SettingError(f"budget={budget!r}", "must lie between 0 and 1", "budget=0.005")
    if type(first_step) is not int or first_step < 0:
        raise SettingError(f"first_step={first_step!r}", "must be a whole number, at least 0", "first_step=0")


def is_amount(value: Any) -> bool:
    """Whether it is a finite number above 0, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0 and isfinite(value)


def begin_attempt(folder: RunFolder, program: Program) -> int:
    """Make the next attempt's folder. Raises SettingError where the folder cannot be a run of another program."""
    if folder.job.exists():
        reason = "is a run that meshwright train made"
        raise SettingError(f"run folder {folder.path}", reason, str(folder.path.with_name(free_name(folder.path))))
    try:
        attempt = start_attempt(folder, None)
        write_program(folder, program)
    except OSError as error:
        raise SettingError(f"run folder {folder.path}", f"cannot be made ({error.strerror})", "runs/mine") from None
    return attempt
