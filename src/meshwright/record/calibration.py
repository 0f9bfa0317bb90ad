"""What a calibration leaves in its folder: what is asked of the ranks, and how long each piece of work took them."""

from pathlib import Path
from typing import Literal

import msgspec

from meshwright.record.folder import RunFolder, replace_text
from meshwright.spec import Cluster

# Which ranks a collective is of: all of a node; neighbours two by two; those of equal number on each node.
Place = Literal["node", "pairs", "across"]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """cluster: the machine as it is known so far, one rank a device. quick: few sizes and repeats, in seconds."""

    cluster: Cluster
    quick: bool


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds that a piece of work took the slowest rank: the median over repeats, or a CPU's shortest for a kernel.

    work: its name. sizes: rows, inner dim and columns of a product; sequences, heads, tokens and head dim of attention;
    bytes of a transfer, or parameters. spread: what lies between the 10th and the 90th hundredth of the repeats, over
    the median, of the least steady rank. ranks, place: of a collective.
    """

    work: str
    sizes: tuple[int, ...]
    seconds: float
    spread: float
    repeats: int
    ranks: int = 1
    place: Place | None = None


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """All figures, and what they were taken with.

    device: a GPU's name; "" for processes on a CPU. missing: work that this machine cannot do, each with why.
    """

    device: str
    ranks: int
    nodes: int
    torch: str
    cuda: str = ""
    nccl: str = ""
    figures: tuple[Figure, ...]
    missing: tuple[str, ...] = ()


def write_request(folder: RunFolder, request: Request) -> None:
    """What the ranks are to read."""
    replace_text(folder.path / "request.json", msgspec.json.encode(request).decode())


def read_request(folder: RunFolder) -> Request:
    """What write_request wrote."""
    return msgspec.json.decode((folder.path / "request.json").read_bytes(), type=Request)


def write_calibration(folder: RunFolder, calibration: Calibration) -> None:
    """What was measured, whole or not at all."""
    replace_text(calibration_path(folder), msgspec.json.encode(calibration).decode())


def read_calibration(folder: RunFolder) -> Calibration:
    """What write_calibration wrote."""
    return msgspec.json.decode(calibration_path(folder).read_bytes(), type=Calibration)


def calibration_path(folder: RunFolder) -> Path:
    """Where it is."""
    return folder.path / "calibration.json"
