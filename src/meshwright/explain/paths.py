"""What lies at the paths that were given: one run, or traces of one program."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from meshwright.explain.explanation import Explanation
from meshwright.explain.run import explain_run
from meshwright.explain.traces import Useful, explain_traces, traces_in
from meshwright.record import RunFolder, open_run
from meshwright.spec import SettingError


def explain_paths(
    paths: Sequence[Path],
    *,
    flops_per_step: float | None = None,
    gpu: str | None = None,
    purposes: Mapping[str, str] | None = None,
) -> Explanation:
    """A run folder, or trace files and folders of them. Raises SettingError where they are neither, or both.

    flops_per_step: model FLOPs of a rank's step, and gpu: its name in the hardware table; for traces alone, and both.
    purposes: of process groups, or of XLA's collectives, by name; for traces alone.
    """
    if not paths:
        raise SettingError("meshwright explain", "takes a run folder or traces", "meshwright explain RUN")
    for option, value in (("--flops-per-step", flops_per_step), ("--gpu", gpu)):
        if value is None and (flops_per_step, gpu) != (None, None):
            raise SettingError(
                "--flops-per-step and --gpu", f"say together what is useful; {option} is lacking", "both"
            )
    runs = [path for path in paths if is_run(path)]
    if runs and len(paths) > 1:
        raise SettingError(str(runs[0]), "is a run, which is explained alone", f"meshwright explain {runs[0]}")
    if runs:
        if gpu is not None:
            raise SettingError("--gpu", "is for traces; a run says by itself what it ran on", "the run without it")
        if purposes:
            reason = "is for traces; a program that is recorded names its groups by record(groups=...)"
            raise SettingError("--purpose", reason, "the run without it")
        return explain_run(open_run(runs[0]))
    useful = Useful(flops_per_step=flops_per_step, gpu=gpu) if flops_per_step is not None and gpu is not None else None
    return explain_traces([trace for path in paths for trace in traces_at(path)], useful, purposes=purposes)


def is_run(path: Path) -> bool:
    """Whether a run was recorded there, ours or another program's."""
    folder = RunFolder(path)
    return folder.job.is_file() or folder.program.is_file()


def traces_at(path: Path) -> list[Path]:
    """The file itself, or the traces in a folder. Raises SettingError where there are none."""
    if path.is_dir():
        found = traces_in(path)
        if not found:
            # Whoever names a folder means a run, unless it holds traces.
            open_run(path)
        return found
    if not path.exists():
        open_run(path)
    return [path]
