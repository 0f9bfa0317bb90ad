"""`meshwright calibrate` up to the seam: the processes that measure, and the file that is made of what they saw."""

import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from meshwright.launch.process import INTERRUPTED
from meshwright.launch.verification import wait_for
from meshwright.plan.calibration import calibrate_cluster
from meshwright.record import RunFolder, replace_text
from meshwright.record.calibration import Calibration, Request, read_calibration, write_request
from meshwright.report.calibration import cluster_toml
from meshwright.spec import Cluster, SettingError


class CalibrationEnded(Exception):
    """The processes that measure ended without a result; `code` is the exit code, and they said why themselves."""

    def __init__(self, code: int) -> None:
        self.code = code
        super().__init__(code)


def check_out(path: Path) -> None:
    """Raise SettingError for a file that could not be written in the end, before minutes are spent on what is in it."""
    if path.exists():
        other = path.with_name(f"{path.stem}-2{path.suffix}")
        raise SettingError(f"--out {path}", "exists already, and may hold what others added", f"--out {other}")
    if not path.parent.is_dir():
        raise SettingError(f"--out {path}", f"there is no folder {path.parent}", f"--out {path.name}")
    if not os.access(path.parent, os.W_OK):
        raise SettingError(f"--out {path}", "cannot be written there", "a folder with write permission")


def run_calibration(request: Request) -> Calibration:
    """Measure this machine, one process a device. Raises CalibrationEnded where that did not end well."""
    try:
        with tempfile.TemporaryDirectory(prefix="meshwright-calibrate-") as name:
            folder = RunFolder(Path(name))
            write_request(folder, request)
            arguments = ["calibrate-agent", name, str(os.getpid())]
            child = subprocess.Popen([sys.executable, "-m", "meshwright", *arguments], start_new_session=True)
            if code := wait_for(child):
                raise CalibrationEnded(code)
            return read_calibration(folder)
    except KeyboardInterrupt:
        print("\nstopped; nothing was written", file=sys.stderr)
        raise CalibrationEnded(INTERRUPTED) from None


def write_cluster(path: Path, request: Request, calibration: Calibration) -> Cluster:
    """The cluster as it was measured, in a file that is there whole or not at all."""
    cluster = calibrate_cluster(calibration, request.cluster, date.today().isoformat())
    try:
        replace_text(path, cluster_toml(cluster, calibration))
    except OSError as error:
        raise SettingError(f"--out {path}", f"cannot be written ({error.strerror})", "another folder") from None
    return cluster
