"""What is on disk before a rank starts: the job as it is run, and what was predicted for it."""

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from meshwright.plan import build_plan, predict, share_machine
from meshwright.record import Prediction, RunFolder, create_run, open_run, read_metrics, replace_text, start_attempt
from meshwright.spec import Cluster, Job, SettingError, check_trained
from meshwright.spec.decode import check_setting, encode_job, read_job
from meshwright.spec.huggingface import config_of_model
from meshwright.spec.pretrained import check_weights

# Measured peaks are within 15% of the prediction (tests/test_plan_memory.py): what is predicted to need this many times
# what a device has would run out of it however wrong the plan is.
FAR_ABOVE = 2.0
# A datasheet's GB may mean GiB.
GIB_OVER_GB = 2**30 / 1e9
# What a resumed run may change; anything else would make it another run.
CHANGEABLE = ("run.steps", "layout", "cluster", "evaluation", "checkpoint", "trace")


def begin_attempt(folder: RunFolder | None, job: Job, *, warn: bool = True) -> tuple[RunFolder, int]:
    """The next attempt at `job`, in its run folder or in a new one. warn: of what may go wrong later.

    Raises SettingError if a new one exists already, where the folder cannot be written, and for a job that cannot be
    trained or is far too large.
    """
    check_trained(job)
    if job.model.path and folder is not None and not folder.saved_steps():
        # It was checked when the job was read from its file, which may be long ago.
        check_weights(job.model)
    refuse_memory(job)
    if folder is None:
        folder = create_run(Path(job.run.folder) / job.run.name, encode_job(job))
    try:
        # A resumed job may have changed; only now is it sure to run.
        replace_text(folder.job, encode_job(job))
        prediction = predict(job)
        if warn:
            warn_of_memory(job, prediction)
            warn_of_weights(job)
        return folder, start_attempt(folder, prediction)
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
        raise SettingError(f"run folder {folder.path}", reason, "room and write permission there") from None


def refuse_memory(job: Job) -> None:
    """Raise SettingError for a job that cannot fit its devices: on a CPU it would not fail, but never get anywhere."""
    memory, there = predict(job).memory, share_machine(job).cluster.device.memory_bytes
    states = memory.parameters + memory.gradients + memory.optimizer_states
    # What the process itself takes is shared by the processes of a machine in part.
    needed = memory.total() - memory.framework
    if states > GIB_OVER_GB * there or needed > FAR_ABOVE * there:
        parts = f"{states / 1e9:.1f} GB of it parameters, gradients and optimizer states"
        reason = f"needs {needed / 1e9:.1f} GB of the {there / 1e9:.1f} GB a device has, {parts}"
        raise SettingError(f"layout of {job.layout.label()}", reason, nearest_that_fits(job))


def nearest_that_fits(job: Job) -> str:
    """The settings of the fastest layout that fits, if one does."""
    ranked = build_plan(job).ranked
    if not ranked:
        return "a smaller model, a shorter data.sequence or more devices; meshwright plan shows what is large"
    fitting = ranked[0].layout
    changed = [name for name in fitting.__struct_fields__ if getattr(fitting, name) != getattr(job.layout, name)]
    return " ".join(f"--set layout.{name}={getattr(fitting, name)}" for name in changed)


def warn_of_memory(job: Job, prediction: Prediction) -> None:
    """Say on standard error that the plan does not see the job fit. No refusal: the plan may be wrong."""
    needed, there = prediction.memory.total(), job.cluster.device.memory_bytes
    if needed > there:
        sizes = f"{needed / 1e9:.1f} GB predicted of {there / 1e9:.1f} GB a device"
        print(f"warning: may run out of memory ({sizes}); meshwright plan shows what fits", file=sys.stderr)


def warn_of_weights(job: Job) -> None:
    """Say on standard error that convert will refuse what the run trains. No refusal: it may be for no other use."""
    try:
        config_of_model(job.model)
    except SettingError as error:
        print(f"warning: meshwright convert will refuse this run: {error}", file=sys.stderr)


def forget_untrained(folder: RunFolder, attempt: int) -> None:
    """Remove a run whose first attempt ended before its first step, so that the corrected command finds its name free.

    A run that has trained, or that somebody resumed, is left as it is.
    """
    if attempt == 0 and not read_metrics(folder)[0] and not folder.saved_steps():
        shutil.rmtree(folder.path, ignore_errors=True)


def reopen_run(
    path: Path, settings: Sequence[str], *, local: Callable[[int], Cluster], admit: Callable[[Cluster], None]
) -> tuple[RunFolder, Job]:
    """An existing run and its job with `settings` applied, for one more attempt. local, admit: as for read_job.

    Raises SettingError for a setting that would make it another run, and for a run that has no steps left.
    """
    folder = open_run(path)
    for setting in settings:
        key = setting.partition("=")[0].strip()
        if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in CHANGEABLE):
            check_setting(setting)  # what no job has is a slip, and not a change
            changeable = ", ".join(CHANGEABLE)
            raise SettingError(f"--set {setting}", "cannot change in a run that has begun", changeable)
    job = read_job(folder.job, settings, local=local, admit=admit)
    done = max(folder.saved_steps(), default=0)
    if done >= job.run.steps:
        more = f"--set run.steps={2 * job.run.steps}"
        raise SettingError(f"--resume {path}", f"all {job.run.steps} steps are done", more)
    return folder, job
