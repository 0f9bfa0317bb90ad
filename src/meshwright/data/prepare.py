"""From text to a token folder, once: built beside its place and renamed into it last."""

import hashlib
import os
import shutil
import tempfile
from array import array
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from meshwright.data.folder import (
    DOCUMENTS_FILE,
    END,
    MANIFEST_FILE,
    TOKENS_FILE,
    VOCABULARY,
    Manifest,
    TokenFolder,
    is_prepared,
    open_folder,
)
from meshwright.data.source import STANDARD_LIBRARY, list_files, read_documents
from meshwright.spec import DataSettings, SettingError

# Bumped when the same text would give other tokens: it is part of the fingerprint.
TOKENIZER = "bytes-1"
CHUNK_TOKENS = 1 << 24


def prepare(settings: DataSettings) -> TokenFolder:
    """The token folder of `settings.path`: as it is if prepared already, from the cache, or made now.

    Any number of processes may do this at once; each makes its own and the first to finish is kept.
    """
    given = Path(settings.path).expanduser()
    if settings.path != STANDARD_LIBRARY and is_prepared(given):
        return open_folder(given)
    root, files = list_files(settings.path)
    fingerprint = fingerprint_of(root, files)
    place = Path(settings.cache).expanduser() / fingerprint[:16]
    if not place.is_dir():
        build(settings, files, fingerprint, place)
    return open_folder(place)


def fingerprint_of(root: Path, files: list[Path]) -> str:
    """Changes when a file is added, removed, renamed, resized or written to."""
    listing = hashlib.sha256(f"{TOKENIZER}\n{root.resolve()}\n".encode(errors="surrogateescape"))
    for file in files:
        # A dangling link has no size; reading it says so in a clear line.
        stat = file.stat() if file.exists() else None
        size, changed = (stat.st_size, stat.st_mtime_ns) if stat else (0, 0)
        listing.update(f"{file.relative_to(root)}\0{size}\0{changed}\n".encode(errors="surrogateescape"))
    return listing.hexdigest()


def build(settings: DataSettings, files: list[Path], fingerprint: str, place: Path) -> None:
    """Make the token folder at `place`, whole or not at all."""
    partial: Path | None = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
        write_folder(partial, settings.path, files, fingerprint)
        partial.chmod(0o755)  # mkdtemp's folders are closed to the rest of a team
        try:
            partial.rename(place)
        except OSError:
            # Another process was first; what it made is the same. Any other reason is raised on.
            if not is_prepared(place):
                raise
    except OSError as error:
        raise SettingError(
            f'data.cache = "{settings.cache}"',
            f"tokens cannot be written there ({error.strerror})",
            "a writable folder with room for twice the text",
        ) from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def write_folder(path: Path, source: str, files: list[Path], fingerprint: str) -> None:
    """Fill `path` with the three files, one pass over the text and one over the tokens."""
    with (path / TOKENS_FILE).open("wb", buffering=1 << 20) as file:
        offsets, checksum = write_tokens(file, source, files)
        flush(file)
    if len(offsets) == 1:
        raise SettingError(f'data.path = "{source}"', "holds files but no text", "a folder of .txt or .jsonl files")
    with (path / DOCUMENTS_FILE).open("wb") as file:
        np.save(file, offsets, allow_pickle=False)
        flush(file)
    tokens = np.memmap(path / TOKENS_FILE, dtype="<u2", mode="r")
    manifest = Manifest(
        source=source,
        fingerprint=fingerprint,
        documents=len(offsets) - 1,
        tokens=tokens.size,
        tokens_bytes=tokens.nbytes,
        vocabulary=VOCABULARY,
        checksum=checksum,
        bigram_entropy=bigram_entropy(tokens, VOCABULARY),
    )
    with (path / MANIFEST_FILE).open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
        flush(file)


def write_tokens(file: BinaryIO, source: str, files: list[Path]) -> tuple[NDArray[np.int64], str]:
    """Write each document that has text, and its end token. Returns the offsets and the checksum."""
    end = np.array([END], dtype="<u2").tobytes()
    checksum = hashlib.sha256()
    offsets = array("q", [0])  # 8 bytes a document, where a list takes 40
    for document in read_documents(source, files):
        length = 0
        for piece in document:
            tokens = np.frombuffer(piece, dtype=np.uint8).astype("<u2").tobytes()
            length += len(piece)
            file.write(tokens)
            checksum.update(tokens)
        if length:
            file.write(end)
            checksum.update(end)
            offsets.append(offsets[-1] + length + 1)
    return np.array(offsets, dtype=np.int64), checksum.hexdigest()


def flush(file: BinaryIO) -> None:
    """To the disk itself, so that what is renamed into place is whole even after a power cut."""
    file.flush()
    os.fsync(file.fileno())


def bigram_entropy(tokens: NDArray[Any], vocabulary: int) -> float:
    """Mean uncertainty of a token given the one before it, in nats, over all adjacent pairs of `tokens`."""
    counts = np.zeros(vocabulary * vocabulary, dtype=np.int64)
    for start in range(0, tokens.size - 1, CHUNK_TOKENS):
        chunk = tokens[start : start + CHUNK_TOKENS + 1].astype(np.int64)  # one more: the pair across the border
        counts += np.bincount(chunk[:-1] * vocabulary + chunk[1:], minlength=counts.size)
    pairs = counts.reshape(vocabulary, vocabulary)
    firsts = np.broadcast_to(pairs.sum(axis=1, keepdims=True), pairs.shape)
    seen = pairs > 0
    return float((pairs[seen] * np.log(firsts[seen] / pairs[seen])).sum() / pairs.sum())
