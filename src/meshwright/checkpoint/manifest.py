"""What a checkpoint holds: every tensor's whole shape, and which file has which part of it."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec
import torch
from torch.optim import Optimizer

from meshwright.parallel import Stages
from meshwright.record import MANIFEST
from meshwright.spec import Layout, SettingError


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A block of a tensor: its offset and shape within the whole, in the file named."""

    file: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor: its whole shape and the parts that make it up."""

    shape: tuple[int, ...]
    parts: list[Part]


class ShardIndex(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank wrote, and its file's size and CRC-32."""

    entries: dict[str, Entry]
    file: str
    bytes: int
    crc32: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The whole checkpoint.

    step: training steps done; the data's position follows from it. corpus: checksum of the tokens trained on.
    """

    format: int = 1
    step: int
    corpus: str
    layout: Layout
    entries: dict[str, Entry]
    files: dict[str, tuple[int, int]]


def checksum(file: BinaryIO) -> int:
    """CRC-32 of a file: enough to notice damage, and several times faster than a digest that resists forgery."""
    value = 0
    while piece := file.read(1 << 24):
        value = zlib.crc32(piece, value)
    return value


def without(folder: Path) -> str:
    """What to do about a checkpoint that cannot be read."""
    return f"rm -r {folder}, and the checkpoint before it is used"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint's folder. Raises SettingError where it is missing or damaged."""
    try:
        return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except OSError as error:
        raise SettingError(f"checkpoint {folder}", f"has no manifest ({error.strerror})", without(folder)) from None
    except msgspec.DecodeError as error:
        raise SettingError(f"checkpoint {folder}", f"has a damaged manifest ({error})", without(folder)) from None


def named_state(model: Stages, optimizer: Optimizer) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Every tensor of a run's state with its name and its parameter: model.<parameter>, optimizer.<state>.<parameter>.

    A tied head's copy of the embedding is no state of its own. A buffer, model.<buffer>, comes with a parameter of its
    module: the same ranks have it.
    """
    for name, buffer in model.named_buffers():
        module = model.get_submodule(name.rpartition(".")[0])
        yield f"model.{name}", buffer, next(module.parameters(recurse=False))
    for name, parameter in model.named_parameters():
        if parameter is not model.tied_copy():
            yield f"model.{name}", parameter.detach(), parameter
            for key, value in optimizer.state.get(parameter, {}).items():
                yield f"optimizer.{key}.{name}", value, parameter
