"""Loading: each rank reads the parts it needs, whatever layout wrote them."""

from itertools import chain
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from meshwright.checkpoint.manifest import Entry, Manifest, Part, checksum, read_manifest, without
from meshwright.parallel import PartOptimizer, Stages, local_part
from meshwright.spec import SettingError, home_of


def load_checkpoint(folder: Path, model: Stages, optimizer: PartOptimizer, corpus: str) -> int:
    """Fill model and optimizer from a checkpoint and return its step.

    Raises SettingError where a tensor is missing or mis-shaped, a file is missing or damaged, or `corpus`, the
    checksum of the tokens, is not what was trained on so far.
    """
    manifest = read_manifest(folder)
    if manifest.corpus != corpus:
        raise SettingError("data.path", f"is not the text that {folder} was trained on", "the same files, or a new run")
    reader = Reader(folder, manifest)
    for own_name, parameter in model.named_parameters():
        name = home_of(model.spec, own_name)
        reader.fill(f"model.{name}", parameter.detach())
        part, offset, shape = local_part(parameter.detach())
        for key in state_keys(manifest, name):
            # fp32 both: the optimizers here keep a step count for each parameter, and moments like the parameter.
            count = not manifest.entries[f"optimizer.{key}.{name}"].shape
            state = torch.zeros((), device=part.device) if count else torch.zeros_like(part)
            if count:
                reader.fill(f"optimizer.{key}.{name}", state)
            else:
                reader.fill_part(f"optimizer.{key}.{name}", state, offset, shape, tuple(parameter.shape))
            optimizer.set_state(parameter, key, state)
    for name, buffer in model.named_buffers():
        reader.fill(f"model.{name}", buffer)
    return manifest.step


def state_keys(manifest: Manifest, parameter: str) -> list[str]:
    """The optimizer's states for a parameter."""
    ending = f".{parameter}"
    found = (name for name in manifest.entries if name.startswith("optimizer.") and name.endswith(ending))
    keys = (name.removeprefix("optimizer.").removesuffix(ending) for name in found)
    # "weight" is also the ending of "norm.weight": a key of ours has no dot in it.
    return [key for key in keys if "." not in key]


def read_model_weights(folder: Path, model: nn.Module) -> int:
    """Fill a whole model in one process from a checkpoint and return the checkpoint's step."""
    manifest = read_manifest(folder)
    reader = Reader(folder, manifest)
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        reader.fill(f"model.{name}", tensor.detach())
    return manifest.step


class Reader:
    """Reads blocks of tensors from a checkpoint's files, each checked once against its checksum before use."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._manifest = manifest
        self._checked: set[str] = set()

    def fill(self, name: str, tensor: torch.Tensor) -> None:
        """Copy the whole tensor `name`, or this rank's part of it, into `tensor`."""
        self.fill_part(name, *local_part(tensor), tuple(tensor.shape))

    def fill_part(
        self, name: str, part: torch.Tensor, offset: tuple[int, ...], shape: tuple[int, ...], whole: tuple[int, ...]
    ) -> None:
        """Copy what lies at `offset` of the tensor `name`, of the shape `whole`, into `part` of `shape`."""
        entry = self._entry(name)
        if tuple(entry.shape) != whole:
            raise SettingError(
                f"checkpoint {self._folder}",
                f"{name} has shape {tuple(entry.shape)} where the model has {whole}",
                "the job that wrote it",
            )
        for held in entry.parts:
            self._copy_overlap(name, entry, held, part, offset, shape)

    def row(self, name: str, number: int) -> torch.Tensor:
        """One row, along dim 0, of the tensor `name`, in fp32."""
        entry = self._entry(name)
        shape = (1, *entry.shape[1:])
        row = torch.empty(shape)
        for part in entry.parts:
            self._copy_overlap(name, entry, part, row, (number,) + (0,) * (len(shape) - 1), shape)
        return row[0]

    def _entry(self, name: str) -> Entry:
        entry = self._manifest.entries.get(name)
        if entry is None:
            raise SettingError(f"checkpoint {self._folder}", f"holds no tensor {name}", "the job that wrote it")
        return entry

    def _copy_overlap(
        self,
        name: str,
        entry: Entry,
        part: Part,
        local: torch.Tensor,
        offset: tuple[int, ...],
        shape: tuple[int, ...],
    ) -> None:
        low = [max(a, b) for a, b in zip(offset, part.offset, strict=True)]
        high = [min(a + n, b + m) for a, n, b, m in zip(offset, shape, part.offset, part.shape, strict=True)]
        if any(a >= b for a, b in zip(low, high, strict=True)):
            return
        self._check(part.file)
        with safe_open(self._folder / part.file, framework="pt") as file:
            if not entry.shape:
                local.copy_(file.get_tensor(name))
                return
            source = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, part.offset, strict=True))
            target = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True))
            local[target].copy_(file.get_slice(name)[source])

    def _check(self, file: str) -> None:
        if file in self._checked:
            return
        path = self._folder / file
        size, crc32 = self._manifest.files.get(file, (0, 0))
        try:
            with path.open("rb") as opened:
                whole = path.stat().st_size == size and checksum(opened) == crc32
        except OSError as error:
            raise SettingError(
                f"checkpoint {self._folder}", f"{file}: {error.strerror}", without(self._folder)
            ) from None
        if not whole:
            raise SettingError(
                f"checkpoint {self._folder}",
                f"{file} is damaged: its checksum differs",
                without(self._folder),
            )
        self._checked.add(file)
