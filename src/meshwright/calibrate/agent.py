"""The torch side of `meshwright calibrate`: a rank for each device, started here or by torchrun, and what they saw."""

from pathlib import Path

import torch.distributed as dist

from meshwright.calibrate.machine import measure_machine
from meshwright.parallel import start_distributed, stop_distributed
from meshwright.record import RunFolder
from meshwright.record.calibration import Calibration, Request, read_request, write_calibration
from meshwright.train.agent import start_ranks
from meshwright.train.worker import leave_word


def calibrate_folder(run: str) -> int:
    """Measure what the folder's request asks for, on ranks of this node. Returns an exit code."""
    folder = RunFolder(Path(run))
    folder.attempt(0).mkdir(parents=True)
    request = read_request(folder)
    return start_ranks(folder, 0, request.cluster.devices, calibrate_rank, (run,))


def calibrate_rank(run: str) -> None:
    """A rank that the agent started; the first one writes down what all of them saw."""
    folder = RunFolder(Path(run))
    with leave_word(folder, 0):
        request = read_request(folder)
        device = start_distributed(request.cluster)
        calibration = measure_machine(request, device)
        if dist.get_rank() == 0:
            write_calibration(folder, calibration)
    stop_distributed()


def join_calibration(request: Request) -> Calibration | None:
    """The same as a rank of an external torchrun. What was measured on the first rank, None on the others."""
    device = start_distributed(request.cluster)
    calibration = measure_machine(request, device)
    first = dist.get_rank() == 0
    stop_distributed()
    return calibration if first else None
