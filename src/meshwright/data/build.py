"""A token folder in the making: chunks are added in order, and what was added survives an interruption.

A journal says what is whole. It is written after what it speaks of is on the disk, so that after a crash everything
behind its last line is cut off, and the next attempt goes on from there.
"""

import hashlib
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from meshwright.data.encode import Encoded
from meshwright.data.folder import DOCUMENTS_FILE, MANIFEST_FILE, MASK_FILE, TOKENS_FILE, Manifest

ENDS_FILE = "ends.part"
# The number changes when the same files would be cut into other chunks.
JOURNAL_FILE = "journal-1.part"
COPY_BYTES = 1 << 20
COUNT_TOKENS = 1 << 20
# Above this a table of all pairs is larger than 32 MiB; and with so many kinds of tokens most pairs of an ordinary
# corpus occur so seldom that their entropy would be far too low to be a mark for a model.
LARGEST_BIGRAM_VOCABULARY = 2048


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """The journal's line: what is whole after `chunks` chunks. checksum: SHA-256 of the tokens so far."""

    chunks: int = 0
    tokens: int = 0
    documents: int = 0
    masked: int = 0
    checksum: str = hashlib.sha256().hexdigest()


class FolderBuilder:
    """Adds chunks to the folder at `path`, from where an earlier attempt left off. Use as a context."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._path = path
        self._dtype = dtype
        self._hash = hashlib.sha256()
        # Closes every file, even where one cannot write the last of what it holds.
        self._files = ExitStack()
        self.done = self._trusted()
        self._tokens = self._open(TOKENS_FILE, self.done.tokens * dtype.itemsize)
        self._ends = self._open(ENDS_FILE, self.done.documents * 8)
        # Made only when a first token is masked; what was not written of it reads as zeros: as targets.
        self._mask = self._open(MASK_FILE, self.done.tokens) if self.done.masked else None
        self._journal = self._open(JOURNAL_FILE, 0)
        self.save()

    def __enter__(self) -> "FolderBuilder":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def add(self, encoded: Encoded) -> None:
        """Add the next chunk. An interruption on the way leaves it not added."""
        content = np.ascontiguousarray(encoded.tokens).data.cast("B")
        self._tokens.seek(self.done.tokens * self._dtype.itemsize)
        self._tokens.write(content)
        checksum = self._hash.copy()
        checksum.update(content)
        ends = self.done.tokens + np.cumsum(encoded.lengths)
        # The last one's end is not here yet.
        ends = ends[:-1] if encoded.goes_on else ends
        self._ends.seek(self.done.documents * 8)
        self._ends.write(ends.astype("<i8").tobytes())
        if encoded.masked is not None:
            self._mask = self._mask or self._open(MASK_FILE, 0)
            self._mask.seek(self.done.tokens)
            self._mask.write(encoded.masked.tobytes())
        done = Entry(
            chunks=self.done.chunks + 1,
            tokens=self.done.tokens + len(encoded.tokens),
            documents=self.done.documents + len(ends),
            masked=self.done.masked + (0 if encoded.masked is None else int(encoded.masked.sum())),
            checksum=checksum.hexdigest(),
        )
        self.done, self._hash = done, checksum

    def save(self) -> None:
        """Make what was added safe from whatever happens next."""
        if self._mask is not None:
            self._mask.truncate(self.done.tokens)
        for file in (self._tokens, self._ends, self._mask):
            if file is not None:
                flush(file)
        self._journal.write(msgspec.json.encode(self.done) + b"\n")
        flush(self._journal)

    def finish(self, *, source: str, fingerprint: str, vocabulary: int) -> None:
        """Write what makes it a token folder, and remove what it was built with."""
        self.save()
        write_documents(self._path, self.done.documents, self._path / ENDS_FILE)
        tokens = np.memmap(self._path / TOKENS_FILE, dtype=self._dtype, mode="r")
        masked = self.done.masked
        write_manifest(
            self._path,
            Manifest(
                source=source,
                fingerprint=fingerprint,
                documents=self.done.documents,
                tokens=tokens.size,
                tokens_bytes=tokens.nbytes,
                dtype=self._dtype.name,  # pyright: ignore[reportArgumentType]
                vocabulary=vocabulary,
                checksum=self.done.checksum,
                masked=masked,
                mask_checksum=checksum_of(self._path / MASK_FILE).hexdigest() if masked else "",
                # Of all tokens, which a loss over some of them cannot be held against.
                bigram_entropy=None if masked else bigram_entropy(tokens, vocabulary),
            ),
        )
        for name in (ENDS_FILE, JOURNAL_FILE):
            (self._path / name).unlink()

    def _trusted(self) -> Entry:
        """The journal's last whole line that the files bear out; the beginning where they do not."""
        lines = (self._path / JOURNAL_FILE).read_bytes().splitlines() if (self._path / JOURNAL_FILE).is_file() else []
        entry = Entry()
        for line in lines:
            try:
                entry = msgspec.json.decode(line, type=Entry)
            except msgspec.DecodeError:  # cut off while it was written
                break
        sizes = {TOKENS_FILE: entry.tokens * self._dtype.itemsize, ENDS_FILE: entry.documents * 8}
        sizes |= {MASK_FILE: entry.tokens} if entry.masked else {}
        files = [self._path / name for name in sizes]
        if not all(f.is_file() and f.stat().st_size >= size for f, size in zip(files, sizes.values(), strict=True)):
            return Entry()
        checksum = checksum_of(self._path / TOKENS_FILE, sizes[TOKENS_FILE])
        if checksum.hexdigest() != entry.checksum:
            return Entry()
        self._hash = checksum
        return entry

    def _open(self, name: str, size: int) -> BinaryIO:
        """A file cut to the part that is whole, to be written on."""
        path = self._path / name
        file = self._files.enter_context(path.open("r+b" if path.exists() else "w+b", buffering=COPY_BYTES))
        file.truncate(size)
        file.seek(size)
        return file


def write_documents(path: Path, documents: int, ends: Path | NDArray[np.int64]) -> None:
    """documents.npy, from the ends of the documents: an array, or a file of int64. Little of it is held."""
    array = np.memmap(ends, dtype="<i8", mode="r") if isinstance(ends, Path) else ends
    with (path / DOCUMENTS_FILE).open("wb") as file:
        header = {"descr": "<i8", "fortran_order": False, "shape": (documents + 1,)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(np.zeros(1, "<i8").tobytes())
        for start in range(0, documents, COUNT_TOKENS):
            file.write(array[start : start + COUNT_TOKENS].astype("<i8").tobytes())
        flush(file)


def write_manifest(path: Path, manifest: Manifest) -> None:
    """manifest.json, which makes a folder one of tokens: written last."""
    with (path / MANIFEST_FILE).open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
        flush(file)


def flush(file: BinaryIO) -> None:
    """To the disk itself, so that what is renamed into place is whole even after a power cut."""
    file.flush()
    os.fsync(file.fileno())


def checksum_of(file: Path, size: int | None = None) -> Any:
    """SHA-256 of a file, or of its first `size` bytes; more can be added to it."""
    checksum = hashlib.sha256()
    left = file.stat().st_size if size is None else size
    with file.open("rb") as content:
        while left > 0 and (piece := content.read(min(COPY_BYTES, left))):
            checksum.update(piece)
            left -= len(piece)
    return checksum


def bigram_entropy(tokens: NDArray[Any], vocabulary: int) -> float | None:
    """Mean uncertainty of a token given the one before it, in nats, over all adjacent pairs of `tokens`; None where
    the vocabulary is too large for it to mean much, or where there is no pair.
    """
    if vocabulary > LARGEST_BIGRAM_VOCABULARY or tokens.size < 2:
        return None
    counts = np.zeros(vocabulary * vocabulary, dtype=np.int64)
    for start in range(0, tokens.size - 1, COUNT_TOKENS):
        chunk = tokens[start : start + COUNT_TOKENS + 1].astype(np.int64)  # one more: the pair across the border
        counts += np.bincount(chunk[:-1] * vocabulary + chunk[1:], minlength=counts.size)
    pairs = counts.reshape(vocabulary, vocabulary)
    firsts = np.broadcast_to(pairs.sum(axis=1, keepdims=True), pairs.shape)
    seen = pairs > 0
    return float((pairs[seen] * np.log(firsts[seen] / pairs[seen])).sum() / pairs.sum())
