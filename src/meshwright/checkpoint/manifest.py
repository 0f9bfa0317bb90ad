"""What a checkpoint holds: every tensor's whole shape, and which file has which part of it."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec
import torch

from meshwright.parallel import PartOptimizer, Stages, local_part
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


class State(NamedTuple):
    """A tensor of a run's state, as far as this rank holds it.

    part: this rank's part, of `shape` from `offset` within a tensor of the shape `whole`. spread: whether the ranks
    that hold `parameter` in parts have parts of this too; else each of them has all of it.
    """

    name: str
    part: torch.Tensor
    whole: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    parameter: torch.nn.Parameter
    spread: bool


def named_state(model: Stages, optimizer: PartOptimizer) -> Iterator[State]:
    """Every tensor of a run's state: model.<parameter>, model.<buffer>, optimizer.<state>.<parameter>.

    A tied head's copy of the embedding is no state of its own. A buffer comes with a parameter of its module: the same
    ranks have it.
    """
    for name, buffer in model.named_buffers():
        module = model.get_submodule(name.rpartition(".")[0])
        yield undivided(f"model.{name}", buffer, next(module.parameters(recurse=False)))
    for name, parameter in model.named_parameters():
        if parameter is not model.tied_copy():
            part, offset, shape = local_part(parameter.detach())
            whole = tuple(parameter.shape)
            yield State(f"model.{name}", part, whole, offset, shape, parameter, spread=True)
            for key, value in optimizer.states(parameter).items():
                named = f"optimizer.{key}.{name}"
                if value.dim():
                    yield State(named, value, whole, offset, shape, parameter, spread=True)
                else:
                    yield undivided(named, value, parameter)


def undivided(name: str, tensor: torch.Tensor, parameter: torch.nn.Parameter) -> State:
    """The state of a tensor that each rank with the parameter has all of."""
    shape = tuple(tensor.shape)
    return State(name, tensor, shape, (0,) * len(shape), shape, parameter, spread=False)
