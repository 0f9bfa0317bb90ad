"""A run's newest checkpoint as a folder that transformers loads. Runs anywhere; one output file is in memory."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from meshwright.checkpoint.load import Reader
from meshwright.checkpoint.manifest import read_manifest
from meshwright.record import RunFolder, replace_text
from meshwright.spec import Job, SettingError
from meshwright.spec.huggingface import Config, config_of_model
from meshwright.spec.pretrained import CONFIG, INDEX_FILE, SINGLE_FILE, read_config
from meshwright.spec.tensors import Piece, pieces_of, their_shapes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# What transformers calls them in a config.
DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16"}
# As large as the files that transformers itself wrote until its version 5.
FILE_BYTES = 5 * 10**9
TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What stands beside a folder's weights and stays with them.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


def convert_run(run: RunFolder, job: Job, out: Path | None, dtype: str | None, file_bytes: int = FILE_BYTES) -> Path:
    """Write the weights of a run's newest checkpoint as a Hugging Face folder and return it.

    out: by default hf-step-N in the run folder. dtype: by default that of the folder the run began from, or else fp32,
    in which the weights are trained. Raises SettingError where that folder is needed and gone, and where `out` exists.
    """
    saved = run.saved_steps()
    if not saved:
        raise SettingError(f"run folder {run.path}", "has no checkpoint yet", "a run with checkpoint.every_steps set")
    out = out or run.path / f"hf-step-{saved[-1]}"
    if out.exists():
        raise SettingError(f"--out {out}", "exists already, and is not overwritten", "--out with another folder")
    config = config_of_model(job.model)
    if job.model.max_positions == 0:
        # transformers has no word for "not stated", and the model has seen no longer sequence.
        config["max_position_embeddings"] = job.data.sequence
    began_from = read_config(Path(job.model.path)) if job.model.path and Path(job.model.path, CONFIG).is_file() else {}
    dtype = dtype or default_dtype(job, began_from)
    # Without a word on them transformers would take its own, which are other tokens.
    config |= {key: began_from.get(key) for key in TOKEN_KEYS}
    # Both names of it: transformers 4 reads the first, 5 the second.
    config |= {"torch_dtype": DTYPE_NAMES[dtype], "dtype": DTYPE_NAMES[dtype]}
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_weights(run.checkpoint(saved[-1]), job, partial, dtype, file_bytes)
        for source in companions(job):
            shutil.copyfile(source, partial / source.name)
        replace_text(partial / CONFIG, as_text(config))
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        raise SettingError(f"--out {out}", f"cannot be written ({error})", "--out FOLDER where there is room") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def default_dtype(job: Job, began_from: Config) -> str:
    """The dtype of the folder that a run began from, where it is one that is written here; fp32 of other runs."""
    if not job.model.path:
        return "fp32"
    if not began_from:
        reason = "is gone, and its dtype would be the default"
        raise SettingError(f'model.path = "{job.model.path}"', reason, "--dtype fp32 or --dtype bf16")
    theirs = began_from.get("dtype", began_from.get("torch_dtype"))
    return next((ours for ours, name in DTYPE_NAMES.items() if name == theirs), "fp32")


def write_weights(checkpoint: Path, job: Job, folder: Path, dtype: str, file_bytes: int) -> None:
    """The weights as safetensors files of at most `file_bytes`, unless one tensor is larger, with an index for many."""
    reader = Reader(checkpoint, read_manifest(checkpoint))
    pieces = pieces_of(job.model)
    itemsize = DTYPES[dtype].itemsize
    sizes = {name: torch.Size(shape).numel() * itemsize for name, shape in their_shapes(pieces).items()}
    files = list(divided(sizes, file_bytes))
    names = [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    if len(files) == 1:
        names = [SINGLE_FILE]
    else:
        weight_map = {tensor: name for name, tensors in zip(names, files, strict=True) for tensor in tensors}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        replace_text(folder / INDEX_FILE, as_text(index))
    for name, tensors in zip(names, files, strict=True):
        written = {
            tensor: joined(reader, [piece for piece in pieces if piece.theirs == tensor], DTYPES[dtype])
            for tensor in tensors
        }
        # transformers refuses a file that does not say which library's tensors it holds.
        save_file(written, folder / name, metadata={"format": "pt"})


def divided(sizes: dict[str, int], file_bytes: int) -> Iterator[list[str]]:
    """Tensors in order, as many to a file as fit."""
    file: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if file and filled + size > file_bytes:
            yield file
            file, filled = [], 0
        file.append(name)
        filled += size
    yield file


def joined(reader: Reader, pieces: list[Piece], dtype: torch.dtype) -> torch.Tensor:
    """One of their tensors from our parameters, which are its rows."""
    parts: list[torch.Tensor] = []
    for piece in pieces:
        if piece.expert is not None:
            whole = reader.row(f"model.{piece.ours}", piece.expert)
        else:
            whole = torch.empty(piece.shape)
            reader.fill(f"model.{piece.ours}", whole)
        parts.append(whole.to(dtype))
    rows = torch.cat(parts) if len(parts) > 1 else parts[0]
    return rows.T.contiguous() if pieces[0].transposed else rows


def companions(job: Job) -> list[Path]:
    """Tokenizer and generation files: of the folder that the run began from, or else of its tokenizer's."""
    tokenizer = Path(job.data.tokenizer)
    folders = [Path(job.model.path)] if job.model.path else []
    folders += [tokenizer if tokenizer.is_dir() else tokenizer.parent] if job.data.tokenizer != "bytes" else []
    found: dict[str, Path] = {}
    for folder in folders:
        for name in COMPANIONS:
            if (folder / name).is_file():
                found.setdefault(name, folder / name)
    return list(found.values())


def as_text(content: dict[str, Any]) -> str:
    """JSON for people."""
    return msgspec.json.format(msgspec.json.encode(content)).decode() + "\n"
