"""Where text comes from: the files of a source in a fixed order, and their documents as pieces of bytes."""

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import msgspec

from meshwright.spec import SettingError

STANDARD_LIBRARY = "stdlib"
NOT_THE_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}
PIECE_BYTES = 1 << 20
EXAMPLE_LINE = '{"text": "..."}'


class Line(msgspec.Struct):
    """What is read of a line of .jsonl; its other fields are passed over."""

    text: str


def list_files(source: str) -> tuple[Path, list[Path]]:
    """The source's folder and its text files, sorted by path, so that document numbers do not change by themselves."""
    if source == STANDARD_LIBRARY:
        root, suffixes = Path(sysconfig.get_paths()["stdlib"]), (".py",)
    else:
        root, suffixes = Path(source).expanduser(), (".txt", ".jsonl")
    if not root.is_dir():
        reason = "is a file, not a folder" if root.exists() else "no such folder"
        nearest = f'data.path = "{root.parent}"' if root.exists() else 'data.path = "stdlib"'
        raise SettingError(f'data.path = "{source}"', reason, nearest)
    found: list[Path] = []
    for folder, inner, names in os.walk(root, onerror=_refuse):
        inner[:] = [name for name in inner if name not in NOT_THE_LIBRARY] if source == STANDARD_LIBRARY else inner
        found += [Path(folder, name) for name in names if name.endswith(suffixes)]
    if not found:
        raise SettingError(
            f'data.path = "{source}"', f"holds no {' or '.join(suffixes)} file", "a folder of .txt or .jsonl files"
        )
    return root, sorted(found, key=lambda path: path.relative_to(root).as_posix())


def read_documents(source: str, files: list[Path]) -> Iterator[Iterator[bytes]]:
    """Each document as an iterator of pieces, never whole in memory where it is a file of plain text."""
    for file in files:
        try:
            if file.suffix == ".jsonl":
                for text in read_lines(file):
                    yield iter([text])
            elif source == STANDARD_LIBRARY:
                yield iter([read_module(file)])
            else:
                yield read_pieces(file)
        except OSError as error:
            raise unreadable(file, error) from None


def read_lines(file: Path) -> Iterator[bytes]:
    """The text of each line of a .jsonl file; blank lines are passed over."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                text = msgspec.json.decode(line, type=Line).text
            except msgspec.ValidationError:
                raise SettingError(f"{file} line {number}", 'has no "text" that is a string', EXAMPLE_LINE) from None
            except (msgspec.DecodeError, UnicodeDecodeError):
                raise SettingError(f"{file} line {number}", "is not JSON in UTF-8", EXAMPLE_LINE) from None
            yield text.encode()


def read_module(file: Path) -> bytes:
    """A Python source file; nothing where it is not UTF-8 (the library keeps a few such files to test itself)."""
    content = file.read_bytes()
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return b""
    return content


def read_pieces(file: Path) -> Iterator[bytes]:
    """A file of plain text, a piece at a time."""
    try:
        with file.open("rb") as content:
            while piece := content.read(PIECE_BYTES):
                yield piece
    except OSError as error:
        raise unreadable(file, error) from None


def unreadable(file: Path, error: OSError) -> SettingError:
    """A source file that cannot be read."""
    return SettingError(str(file), f"cannot be read ({error.strerror})", "a readable file, or a folder without it")


def _refuse(error: OSError) -> None:
    # os.walk passes over a folder that it cannot list, and part of the corpus would be missing without a word.
    raise unreadable(Path(error.filename), error)
