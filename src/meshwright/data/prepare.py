"""From text to token folders, once: each is built beside its place, in steps that can be taken up again, and renamed
into it last."""

import fcntl
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from meshwright.data.build import FolderBuilder
from meshwright.data.encode import Encoded, dtype_of, encode_chunk
from meshwright.data.folder import TokenFolder, is_prepared, open_folder
from meshwright.data.in_place import write_index
from meshwright.data.progress import TokenisingProgress
from meshwright.data.source import CHUNK_BYTES, STANDARD_LIBRARY, Chunk, list_files, plan_chunks
from meshwright.data.tokenizer import BYTES, Tokenizer, identity_of, open_tokenizer
from meshwright.data.workers import Workers
from meshwright.spec import DataSettings, SettingError
from meshwright.spec.job import TOKEN_FILES

# Seconds of work that an interruption may cost.
SAVE_EVERY_S = 2.0


def prepare(settings: DataSettings, workers: int | None = None) -> list[TokenFolder]:
    """The token folder of each source: as it is if prepared already, from the cache, or made now.

    workers: processes that tokenise; as many as there are cores if not given, or one where that is faster. Their
    number does not change the tokens. Any number of processes may call this at once: one makes a folder, the others
    wait for it.
    """
    return [prepare_source(settings, name, source.path, workers) for name, source in settings.named_sources()]


def prepare_source(settings: DataSettings, setting: str, source: str, workers: int | None) -> TokenFolder:
    """One source's token folder."""
    given = Path(source).expanduser()
    if source != STANDARD_LIBRARY and is_prepared(given):
        return open_folder(given)
    in_place = given.suffix in TOKEN_FILES and given.is_file()
    root, files = (given.parent, [given]) if in_place else list_files(setting, source)
    fingerprint = fingerprint_of(settings, root, files, in_place=in_place)
    place = Path(settings.cache).expanduser() / fingerprint[:16]
    if not place.is_dir():
        with building(settings, place) as partial:
            if partial is None:
                pass
            elif in_place:
                write_index(partial, settings, setting, given, fingerprint)
            else:
                write_folder(partial, settings, setting, source, files, fingerprint, workers)
    return open_folder(place)


def fingerprint_of(settings: DataSettings, root: Path, files: list[Path], *, in_place: bool) -> str:
    """Changes when a file is added, removed, renamed, resized or written to, and with the tokenizer."""
    identity = f"in-place-1\n{settings.dtype}\n{settings.end_token}\n" if in_place else ""
    identity += identity_of(settings)
    listing = hashlib.sha256(f"{identity}\n{root.resolve()}\n".encode(errors="surrogateescape"))
    for file in files:
        # A dangling link has no size; reading it says so in a clear line.
        stat = file.stat() if file.exists() else None
        size, changed = (stat.st_size, stat.st_mtime_ns) if stat else (0, 0)
        listing.update(f"{file.relative_to(root)}\0{size}\0{changed}\n".encode(errors="surrogateescape"))
    return listing.hexdigest()


@contextmanager
def building(settings: DataSettings, place: Path) -> Iterator[Path | None]:
    """The folder to build in, this process's alone; renamed to `place` at the end. None: another process was first.

    A refusal removes it. Anything else that ends the process leaves it, to be gone on with.
    """
    partial = place.with_name(f".{place.name}.partial")
    try:
        lock = lock_folder(partial, place)
        try:
            if lock is None:
                yield None
                return
            try:
                yield partial
            except (SettingError, OSError):
                shutil.rmtree(partial, ignore_errors=True)
                raise
            except KeyboardInterrupt:
                print("stopped; the same command goes on from here", file=sys.stderr)
                raise
            partial.rename(place)
        finally:
            if lock is not None:
                os.close(lock)
    except OSError as error:
        raise SettingError(
            f'data.cache = "{settings.cache}"',
            f"tokens cannot be written there ({error.strerror})",
            "a writable folder with room for twice the text",
        ) from None


def lock_folder(partial: Path, place: Path) -> int | None:
    """Make the folder and lock it, for as long as the process lives or until closed; None once `place` is there."""
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        folder = os.open(partial, os.O_RDONLY)
        fcntl.flock(folder, fcntl.LOCK_EX)
        if place.is_dir():
            os.close(folder)
            # What this call made where the other's had been.
            shutil.rmtree(partial, ignore_errors=True)
            return None
        # While this waited, the folder may have been removed or renamed, and then the lock is on nothing.
        if partial.exists() and os.path.samestat(os.fstat(folder), partial.stat()):
            return folder
        os.close(folder)


def write_folder(
    path: Path,
    settings: DataSettings,
    setting: str,
    source: str,
    files: list[Path],
    fingerprint: str,
    workers: int | None,
) -> None:
    """Fill `path` with the files of a token folder."""
    tokenizer = open_tokenizer(settings)
    vocabulary = tokenizer.vocabulary
    total = sum(part.weight_bytes for chunk in plan_chunks(files, tokenizer.divides) for part in chunk)
    chunks = plan_chunks(files, tokenizer.divides)
    if workers is None:
        # Bytes cost less to make than to send; and a process costs more to start than a chunk.
        workers = 1 if settings.tokenizer == BYTES else min(available_cores(), -(-total // CHUNK_BYTES))
    with FolderBuilder(path, dtype_of(vocabulary)) as builder:
        done = sum(size_of(chunk) for chunk in islice(chunks, builder.done.chunks))
        with TokenisingProgress(total, done) as progress:
            if workers > 1:
                with Workers(settings, vocabulary, workers) as pool:
                    add_all(builder, pool.encode(chunks), progress)
            else:
                add_all(builder, encode_here(chunks, tokenizer), progress)
        if not builder.done.documents:
            raise SettingError(f'{setting} = "{source}"', "holds files but no text", "a folder of .txt or .jsonl files")
        builder.finish(source=source, fingerprint=fingerprint, vocabulary=vocabulary)


def add_all(builder: FolderBuilder, encoded: Iterable[tuple[Chunk, Encoded]], progress: TokenisingProgress) -> None:
    """Add chunks as they come; now and then make sure of them."""
    saved = time.monotonic()
    try:
        for chunk, tokens in encoded:
            builder.add(tokens)
            progress.advance(size_of(chunk))
            if time.monotonic() - saved >= SAVE_EVERY_S:
                builder.save()
                saved = time.monotonic()
    except KeyboardInterrupt:
        builder.save()
        raise


def encode_here(chunks: Iterable[Chunk], tokenizer: Tokenizer) -> Iterator[tuple[Chunk, Encoded]]:
    """Each chunk's tokens, made in this process."""
    return ((chunk, encode_chunk(chunk, tokenizer)) for chunk in chunks)


def size_of(chunk: Chunk) -> int:
    """Its bytes of text."""
    return sum(part.weight_bytes for part in chunk)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
