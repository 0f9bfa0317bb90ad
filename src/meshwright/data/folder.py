"""A token folder: tokens.bin, documents.npy, manifest.json and, where some tokens are no targets, mask.bin.

docs/data.md describes the format.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from meshwright.spec import SettingError

# Byte-level tokens: 0 to 255 are bytes, END ends a document.
END = 256
VOCABULARY = 257

TOKENS_FILE = "tokens.bin"
MASK_FILE = "mask.bin"
DOCUMENTS_FILE = "documents.npy"
MANIFEST_FILE = "manifest.json"


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a token folder holds.

    source: where the text came from. fingerprint: of the source's listing; a changed corpus has another.
    checksum: SHA-256 of tokens.bin; two machines that train together, or a resumed run, can compare it.
    tokens_file, tokens_offset: where the tokens are that were there before and are read in place: not in tokens.bin.
    masked: how many tokens are no targets; mask.bin says which. mask_checksum: its SHA-256.
    bigram_entropy: nats per token that remain when the token before is known; what a model must beat to show that
        it uses more context than one token. None where the folder's maker did not count it.
    """

    format: Literal[1] = 1
    source: str
    fingerprint: str
    documents: int
    tokens: int
    tokens_bytes: int
    dtype: Literal["uint16", "uint32", "int32", "int64"] = "uint16"
    tokens_file: str = ""
    tokens_offset: int = 0
    vocabulary: int
    checksum: str
    masked: int = 0
    mask_checksum: str = ""
    bigram_entropy: float | None = None


@dataclass(frozen=True, kw_only=True)
class TokenFolder:
    """An opened token folder. Document d is tokens[offsets[d] : offsets[d + 1]], its last token the end token.

    masked: true where a token is no target; None where all are.
    """

    path: Path
    manifest: Manifest
    # On disk, mapped.
    tokens: NDArray[Any]
    offsets: NDArray[np.int64]
    masked: NDArray[np.bool_] | None = None


def is_prepared(path: Path) -> bool:
    """Whether `path` is a token folder, damaged or not. manifest.json is too common a name to tell."""
    return (path / TOKENS_FILE).is_file() or (path / DOCUMENTS_FILE).is_file()


def open_folder(path: Path) -> TokenFolder:
    """Map a token folder. Raises SettingError where it is damaged."""
    manifest = _read_manifest(path)
    offsets = _read_offsets(path, manifest)
    file = Path(manifest.tokens_file) if manifest.tokens_file else path / TOKENS_FILE
    size = (file.stat().st_size if file.is_file() else 0) - manifest.tokens_offset
    expected = manifest.tokens * np.dtype(manifest.dtype).itemsize
    if size != manifest.tokens_bytes or size != expected:
        raise _damaged(path, f"{file.name} has {size} bytes where {MANIFEST_FILE} says {manifest.tokens_bytes}")
    # Little-endian whatever the machine, so that a folder can be carried between machines.
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    tokens = np.memmap(file, dtype=dtype, mode="r", offset=manifest.tokens_offset)
    return TokenFolder(path=path, manifest=manifest, tokens=tokens, offsets=offsets, masked=_open_mask(path, manifest))


def _open_mask(path: Path, manifest: Manifest) -> NDArray[np.bool_] | None:
    if not manifest.masked:
        return None
    file = path / MASK_FILE
    size = file.stat().st_size if file.is_file() else 0
    if size != manifest.tokens:
        raise _damaged(path, f"{MASK_FILE} has {size} bytes where {MANIFEST_FILE} says {manifest.tokens} tokens")
    return np.memmap(file, dtype=np.bool_, mode="r")


def _read_manifest(path: Path) -> Manifest:
    try:
        manifest = msgspec.json.decode((path / MANIFEST_FILE).read_bytes(), type=Manifest)
    except OSError as error:
        raise _damaged(path, f"{MANIFEST_FILE} cannot be read ({error.strerror})") from None
    except msgspec.DecodeError as error:
        raise _damaged(path, f"{MANIFEST_FILE} is damaged ({error})") from None
    if manifest.tokens < 1 or manifest.documents < 1:
        raise _damaged(path, f"{MANIFEST_FILE} says {manifest.documents} documents of {manifest.tokens} tokens")
    return manifest


def _read_offsets(path: Path, manifest: Manifest) -> NDArray[np.int64]:
    try:
        offsets = np.load(path / DOCUMENTS_FILE, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise _damaged(path, f"{DOCUMENTS_FILE} is missing or damaged") from None
    if (
        offsets.shape != (manifest.documents + 1,)
        or offsets.dtype != np.int64
        or offsets[0] != 0
        or offsets[-1] != manifest.tokens
        or bool((offsets[1:] < offsets[:-1]).any())
    ):
        raise _damaged(path, f"{DOCUMENTS_FILE} does not fit {MANIFEST_FILE}")
    return offsets


def _damaged(path: Path, reason: str) -> SettingError:
    return SettingError(f"token folder {path}", reason, "remove the folder and prepare it again")
