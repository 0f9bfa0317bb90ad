"""Where text comes from: the files of a source in a fixed order, and how they are cut into chunks of work."""

import os
import sysconfig
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from meshwright.spec import SettingError

STANDARD_LIBRARY = "stdlib"
NOT_THE_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}
SUFFIXES = (".txt", ".jsonl", ".parquet")
# Text that is tokenised at a time: small enough for little memory and for little to be lost when stopped, large enough
# that handing it out costs nothing.
CHUNK_BYTES = 1 << 22
# Where a long text may be divided is looked for at every multiple of this.
PIECE_BYTES = 1 << 19


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Some of a file: bytes of a .txt, the lines of a .jsonl that begin there, or row groups of a .parquet file.

    weight_bytes: the file's bytes in it, to show how far things are.
    """

    file: str
    start: int
    stop: int
    weight_bytes: int


Chunk = list[Part]


def list_files(setting: str, source: str) -> tuple[Path, list[Path]]:
    """The source's folder and its files of text, sorted by path, so that document numbers do not change by themselves.

    setting: what named the source, for an error.
    """
    if source == STANDARD_LIBRARY:
        root, suffixes = Path(sysconfig.get_paths()["stdlib"]), (".py",)
    else:
        root, suffixes = Path(source).expanduser(), SUFFIXES
    if root.is_file() and root.suffix in suffixes:
        return root.parent, [root]
    if not root.is_dir():
        reason = "is not a file of text or tokens" if root.exists() else "no such file or folder"
        nearest = f"{setting} = a folder, or a file that ends in {', '.join(SUFFIXES)}, .npy or .bin"
        raise SettingError(f'{setting} = "{source}"', reason, nearest if root.exists() else f'{setting} = "stdlib"')
    without = NOT_THE_LIBRARY if source == STANDARD_LIBRARY else ()
    found = [file for file in walk(root, without) if file.name.endswith(suffixes)]
    if not found:
        kinds = " or ".join((", ".join(suffixes[:-1]), suffixes[-1]) if len(suffixes) > 1 else suffixes)
        raise SettingError(f'{setting} = "{source}"', f"holds no {kinds} file", "a folder of .txt or .jsonl files")
    return root, sorted(found, key=lambda path: path.relative_to(root).as_posix())


def walk(root: Path, without: Collection[str]) -> Iterator[Path]:
    """Every file under a folder, also through links, but for folders of some names. No folder twice."""
    seen: set[tuple[int, int]] = set()
    for folder, inner, names in os.walk(root, onerror=_refuse, followlinks=True):
        # A link may lead back to where it is. In order, so that of several ways to a folder it is always the same one.
        place = Path(folder).stat()
        inner[:] = sorted(name for name in inner if name not in without)
        if (place.st_dev, place.st_ino) in seen:
            inner.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        yield from (Path(folder, name) for name in names)


def plan_chunks(files: list[Path], divides: Literal["anywhere", "words", "never"]) -> Iterator[Chunk]:
    """The files as chunks of about CHUNK_BYTES, in order: the same for the same files, whoever asks."""
    chunk: Chunk = []
    size = 0
    for file in files:
        try:
            parts = plan_parts(file, divides)
        except OSError as error:
            raise unreadable(file, error) from None
        for part in parts:
            if chunk and size + part.weight_bytes > CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
            chunk.append(part)
            size += part.weight_bytes
    if chunk:
        yield chunk


def plan_parts(file: Path, divides: Literal["anywhere", "words", "never"]) -> list[Part]:
    """One file as parts of at most CHUNK_BYTES, or whole where it cannot be divided."""
    size = file.stat().st_size
    if file.suffix == ".parquet":
        groups = open_parquet(file).metadata.num_row_groups
        share = size // max(1, groups)
        return [Part(file=str(file), start=n, stop=n + 1, weight_bytes=share) for n in range(groups)]
    if file.suffix == ".py" or (file.suffix == ".txt" and divides == "never"):
        return [Part(file=str(file), start=0, stop=size, weight_bytes=size)]
    stops = [*range(CHUNK_BYTES, size, CHUNK_BYTES), size]
    return [
        Part(file=str(file), start=start, stop=stop, weight_bytes=stop - start)
        for start, stop in zip([0, *stops], stops, strict=False)
    ]


def open_parquet(file: Path) -> Any:
    """A .parquet file. Raises SettingError where pyarrow is missing or cannot read it."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        nearest = "pip install 'meshwright[parquet]', or .jsonl files"
        raise SettingError(str(file), "pyarrow, which reads it, is not installed", nearest) from None
    try:
        return parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise SettingError(str(file), f"is not a Parquet file ({error})", "a folder without it") from None


def unreadable(file: Path | str, error: OSError) -> SettingError:
    """A source file that cannot be read."""
    # pyarrow's own errors carry their words elsewhere.
    reason = error.strerror or str(error)
    return SettingError(str(file), f"cannot be read ({reason})", "a readable file, or a folder without it")


def _refuse(error: OSError) -> None:
    # os.walk passes over a folder that it cannot list, and part of the corpus would be missing without a word.
    raise unreadable(Path(error.filename), error)
