"""What another trainer's program says of itself, where a job of ours would say it."""

from collections.abc import Mapping, Sequence

import msgspec

from meshwright.account import StepAccount
from meshwright.explain.explanation import MeasuredSteps
from meshwright.record import Event, Program, RunFolder, read_program
from meshwright.spec import Device
from meshwright.spec.hardware import match_gpu, unknown_gpu

# A world larger than this is a mistake in a file, and no reason to count its ranks one by one.
MOST_RANKS = 2**20
# An account that hides more than this share of a step cannot say where the time goes.
MUCH_UNSEEN = 0.05


def program_of(folder: RunFolder, notes: list[str]) -> Program | None:
    """The program of a run without a job, or None and a note."""
    if folder.job.is_file():
        return None
    program = read_program(folder)
    if program is None:
        notes.append("program.json cannot be read, so nothing is known of the program but its events.")
    return program


def program_device(program: Program | None) -> Device | None:
    """Its device's numbers: of the hardware table, if it is there, and what the program knows better."""
    if program is None or program.kind == "cpu":
        return None
    node = match_gpu(program.device) or unknown_gpu(program.device, 0.0)
    return msgspec.structs.replace(node.device, memory_bytes=program.memory_bytes or node.device.memory_bytes)


def program_mfu(program: Program | None, step_s: float | None) -> float | None:
    """Model FLOPs over what the device could have done in a step; None where either is not known."""
    if program is None or not step_s or not program.flops_per_step or not program.peak_flops_per_s:
        return None
    return program.flops_per_step / (program.peak_flops_per_s * step_s)


def program_world(program: Program, events: Mapping[int, Sequence[Event]]) -> int:
    """Its ranks; those that wrote events where what it says cannot be."""
    seen = max(events, default=-1) + 1
    return program.world_size if seen <= program.world_size <= MOST_RANKS else seen


def is_jax(program: Program | None) -> bool:
    """Whether advice on it must speak of JAX."""
    return program is not None and (program.kind == "xla" or "jax" in program.versions)


def notes_on_program(program: Program, step: MeasuredSteps | None, *, traced: bool = False) -> list[str]:
    """What cannot be told of a run that another trainer recorded; traced: of which there are traces alone."""
    notes: list[str] = []
    if not program.flops_per_step:
        notes.append(f"Which part of compute is useful is not known: model FLOPs {program.flops_from}.")
    elif not program.peak_flops_per_s:
        notes.append(f"Which part of compute is useful is not known: {program.device} is not in the hardware table.")
    if traced and is_jax(program):
        notes.append(
            "XLA's instructions do not say what they are of: compute holds the optimizer's update and recomputing too."
        )
    if step is not None:
        notes += notes_on_unknown(step.account, traced=traced)
    return notes


def notes_on_unknown(account: StepAccount, *, traced: bool) -> list[str]:
    """What an account that was measured from outside does not show."""
    notes: list[str] = []
    if account.share("unseen") > MUCH_UNSEEN and traced:
        notes.append(
            f"{account.share('unseen'):.0%} of the step is `unseen`: a program was out and none of its instructions "
            "ran on the device, or one was a collective of which nobody said what it is for."
        )
    elif account.share("unseen") > MUCH_UNSEEN:
        notes.append(
            f"{account.share('unseen'):.0%} of the step is inside a compiled program, which shows its parts to nobody "
            "outside: they are not guessed. A trace by the framework's profiler shows them: meshwright explain TRACE."
        )
    if account.bubble > 0 or account.comm_pipeline > 0:
        notes.append(
            "The pipeline's schedule was not recorded: of what a rank waits for messages, as much is `imbalance` as "
            "the busiest rank was busier, and the rest is `bubble`."
        )
    return notes
