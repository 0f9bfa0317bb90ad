"""A Hugging Face folder on disk: its config.json, and its safetensors files' headers held against the model.

All of it without torch, so that a folder that does not fit is refused before a process starts or memory is taken.
"""

import json
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import msgspec

from meshwright.spec.errors import SettingError, closest
from meshwright.spec.family import BUILT_FAMILIES
from meshwright.spec.huggingface import Config, as_section, model_of_config
from meshwright.spec.model import ModelSpec
from meshwright.spec.tensors import HEAD, TENSOR_NAMES, pieces_of, their_shapes

CONFIG = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Weights that Hugging Face tools wrote before safetensors: pickles, which can run anything when they are read.
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# What a weight may be stored as; others are packed or quantized.
FLOATS = ("F64", "F32", "F16", "BF16")
# safetensors' own limit; a longer header is no header.
LONGEST_HEADER_BYTES = 100_000_000
COMPARED_BYTES = 1 << 24
A_FOLDER = f"a folder with {CONFIG} and {SINGLE_FILE}"


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """Where a tensor lies: its name in the file, shape, kind of number, and first and last byte."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    begin: int
    end: int


def no_hub(name: str) -> Path:
    """Where nothing may be fetched, a name that is no folder is a mistake."""
    raise SettingError(f'model.path = "{name}"', "is no folder", A_FOLDER)


def expand_pretrained(section: dict[str, Any], find: Callable[[str], Path]) -> tuple[dict[str, Any], bool]:
    """A job's [model] table with the numbers of its `config` or `path`, and whether weights are to be checked.

    A table that says name = "custom" beside its path gives the numbers itself: so a resolved job needs no folder.
    find: where the files of a hub's model are; called only for a path that is no folder here.
    """
    filled = dict(section)
    config, path, name = filled.pop("config", ""), filled.get("path", ""), filled.get("name", "custom")
    for setting, value in (("model.config", config), ("model.path", path)):
        if not isinstance(value, str) or not value.isprintable():
            raise SettingError(f"{setting} = {value}", "must be a path", f'{setting} = "folder"')
    sources = {"config": config, "path": path, "name": name if name != "custom" else ""}
    given = [f'model.{key} = "{value}"' for key, value in sources.items() if value]
    if len(given) > 1:
        raise SettingError(" and ".join(given), "are two ways to give a model's numbers", f"{given[0]} alone")
    if config:
        return msgspec.to_builtins(
            model_of_config(read_json(Path(config), "the config.json of a Hugging Face model"), config)
        ) | filled, False
    if not path or "name" in section:
        return filled, False
    folder = Path(path) if Path(path).is_dir() else find(path)
    model = model_of_config(read_config(folder), str(folder / CONFIG))
    return msgspec.to_builtins(model) | filled | {"path": str(folder)}, True


def read_config(folder: Path) -> Config:
    """A folder's config.json."""
    return read_json(folder / CONFIG, A_FOLDER)


def read_json(path: Path, nearest: str) -> Config:
    """A file with one JSON object. Raises SettingError where it is none."""
    try:
        return as_section(json.loads(path.read_text(encoding="utf-8")), str(path))
    except OSError as error:
        raise SettingError(str(path), f"cannot be read ({error.strerror})", nearest) from None
    except (ValueError, RecursionError) as error:
        raise SettingError(str(path), f"is not JSON ({error})", nearest) from None


def read_stored(model: ModelSpec) -> dict[str, Stored]:
    """Every tensor in the model's folder under its full name, from the headers of its files."""
    folder = Path(model.path)
    stored: dict[str, Stored] = {}
    for file in weight_files(folder):
        stored |= {tensor.name: tensor for tensor in read_header(file)}
    base = TENSOR_NAMES[model.family].base
    # A model that was saved without its head has no common beginning on its names.
    return {name if name.startswith((base, HEAD)) else base + name: tensor for name, tensor in stored.items()}


def weight_files(folder: Path) -> list[Path]:
    """A folder's safetensors files: those that its index names, or the single one."""
    if not folder.is_dir():
        no_hub(str(folder))
    if (folder / INDEX_FILE).is_file():
        listed = as_section(read_json(folder / INDEX_FILE, A_FOLDER).get("weight_map"), str(folder / INDEX_FILE))
        return [folder / name for name in sorted(set(map(str, listed.values())))]
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if pickled:
        reason = f"has its weights in {pickled[0]}, a pickle, and nothing is unpickled here"
        nearest = "the model's safetensors, or save_pretrained(folder, safe_serialization=True) with transformers"
        raise SettingError(f'model.path = "{folder}"', reason, nearest)
    nearest = f'model.config = "{folder / CONFIG}", for the numbers without weights'
    raise SettingError(f'model.path = "{folder}"', f"holds no {SINGLE_FILE} and no {INDEX_FILE}", nearest)


def read_header(path: Path) -> list[Stored]:
    """The tensors of a safetensors file: eight bytes of length, JSON, then the numbers."""
    again = "the whole file, downloaded again"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if 0 < length <= min(size - 8, LONGEST_HEADER_BYTES) else b""
    except OSError as error:
        raise SettingError(str(path), f"cannot be read ({error.strerror})", again) from None
    try:
        header = as_section(json.loads(text), str(path))
        start = 8 + length
        tensors = [
            Stored(
                file=path,
                name=name,
                shape=tuple(entry["shape"]),
                dtype=entry["dtype"],
                begin=start + entry["data_offsets"][0],
                end=start + entry["data_offsets"][1],
            )
            for name, entry in cast(dict[str, dict[str, Any]], header).items()
            if name != "__metadata__"
        ]
    except (ValueError, RecursionError, KeyError, TypeError, IndexError, AttributeError):
        raise SettingError(str(path), "is no safetensors file, or is damaged", again) from None
    whole = max((tensor.end for tensor in tensors), default=size)
    if size != whole:
        raise SettingError(str(path), f"has {size:,} bytes where its header counts {whole:,}", again)
    return tensors


def check_weights(model: ModelSpec) -> None:
    """Raise SettingError unless the model's folder holds its tensors, in their shapes, and no others.

    Of a family that is only planned nothing is read: its weights are not loaded either.
    """
    if model.family not in BUILT_FAMILIES:
        return
    where = f'model.path = "{model.path}"'
    stored, wanted = read_stored(model), their_shapes(pieces_of(model))
    # A checkpoint's length and width show in many tensors at once: one of each kind says enough.
    if missing := [name for name in wanted if name not in stored]:
        extra = [name for name in stored if name not in wanted]
        raise SettingError(where, f"holds no tensor {missing[0]}{and_more(missing)}", near(missing[0], extra))
    for name, shape in wanted.items():
        if stored[name].shape != shape:
            reason = f"{name} has shape {list(stored[name].shape)} where the model has {list(shape)}"
            raise SettingError(where, reason, f"the numbers in its own {CONFIG}")
        if stored[name].dtype not in FLOATS:
            raise SettingError(where, f"{name} is stored as {stored[name].dtype}", "weights in bf16 or fp32")
    ignored = TENSOR_NAMES[model.family].ignored
    extra = [name for name in stored if name not in wanted and not any(fnmatchcase(name, word) for word in ignored)]
    if model.tied_embeddings and f"{HEAD}.weight" in extra:
        check_tied(model, stored)
        extra.remove(f"{HEAD}.weight")
    if extra:
        reason = f"holds {extra[0]}{and_more(extra)}, for which a {model.family} of these numbers has no place"
        raise SettingError(where, reason, "the numbers in its own config.json, or a folder without that tensor")


def check_tied(model: ModelSpec, stored: dict[str, Stored]) -> None:
    """A head that is stored although it is tied must be the embedding, byte for byte."""
    names = TENSOR_NAMES[model.family]
    head, embedding = stored[f"{HEAD}.weight"], stored[f"{names.base}{names.ends['embedding']}.weight"]
    same = (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
    with head.file.open("rb") as one, embedding.file.open("rb") as other:
        one.seek(head.begin)
        other.seek(embedding.begin)
        left = head.end - head.begin if same else 0
        while left > 0 and same:
            take = min(left, COMPARED_BYTES)
            same = one.read(take) == other.read(take)
            left -= take
    if not same:
        reason = f"holds a {HEAD}.weight that is not the embedding, and the model's embeddings are tied"
        raise SettingError(f'model.path = "{model.path}"', reason, "model.tied_embeddings = false")


def and_more(names: list[str]) -> str:
    """How many names there are besides the first."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def near(missing: str, extra: list[str]) -> str:
    """What may have been meant by a tensor that is not there."""
    if missing == f"{HEAD}.weight":
        return "model.tied_embeddings = true"
    return f"a folder that has it where this one has {closest(missing, extra[:3])}" if extra else "the whole folder"
