"""The documents of a chunk: whole ones, and pieces of texts too long to be held whole."""

import re
from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec

from meshwright.data.chat import Message
from meshwright.data.source import PIECE_BYTES, Chunk, Part, open_parquet, unreadable
from meshwright.data.tokenizer import Tokenizer, same_apart
from meshwright.spec import SettingError

EXAMPLE_LINE = '{"text": "..."}'
NO_DOCUMENT = 'has no "text" that is a string, no "messages" and no "prompt" with "completion"'
ROWS = 64
# Of a place where a text may be divided, how many bytes on either side must give the same tokens together and apart,
# how far behind the wanted place one is looked for, and how many are tried.
WINDOW_BYTES = 2048
SEARCH_BYTES = 1 << 16
TRIES = 16
SEAM = re.compile(rb"(?<=\S)[ \n]")


class Document(NamedTuple):
    """A document, or a piece of one. Exactly one of the three kinds is there.

    place: where it stands, for an error. begins, ends: whether the document does so with it.
    """

    place: Callable[[], str]
    text: str | bytes | None = None
    pair: tuple[str, str] | None = None
    messages: list[Message] | None = None
    begins: bool = True
    ends: bool = True

    def whole(self) -> bool:
        """Whether it is no piece."""
        return self.begins and self.ends

    def size(self) -> int:
        """About how many bytes of text."""
        if self.messages is not None:
            return sum(len(message["content"]) for message in self.messages)
        return sum(len(text) for text in ((self.text or "",) if self.pair is None else self.pair))


class Line(msgspec.Struct):
    """What is read of a line of .jsonl or a row of .parquet; its other fields are passed over."""

    text: str | None = None
    messages: list[Message] | None = None
    prompt: str | None = None
    completion: str | None = None


def read_chunk(chunk: Chunk, tokenizer: Tokenizer) -> Iterator[Document]:
    """The chunk's documents in order."""
    for part in chunk:
        try:
            for document in read_part(part, tokenizer):
                yield from divided(document, tokenizer)
        except OSError as error:
            raise unreadable(part.file, error) from None


def read_part(part: Part, tokenizer: Tokenizer) -> Iterator[Document]:
    """The documents of some of a file."""
    match Path(part.file).suffix:
        case ".jsonl":
            return read_lines(part)
        case ".parquet":
            return read_rows(part)
        case ".py":
            return read_module(part)
        case _:
            return read_text(part, tokenizer)


def read_lines(part: Part) -> Iterator[Document]:
    """The lines that begin in a part of a .jsonl file; blank ones are passed over."""
    with Path(part.file).open("rb") as lines:
        at = part.start
        if at:
            # A line that begins before the part belongs to the one before, even by its last byte.
            lines.seek(at - 1)
            at += len(lines.readline()) - 1
        while at < part.stop and (line := lines.readline()):
            if line.strip():
                yield read_line(line, lambda at=at: f"{part.file} line {line_number(part.file, at)}")
            at += len(line)


def line_number(file: str, offset: int) -> int:
    """Of the line that begins at a byte, from 1. Only errors ask."""
    with Path(file).open("rb") as content:
        number = 1
        while offset > 0 and (piece := content.read(min(PIECE_BYTES, offset))):
            number += piece.count(b"\n")
            offset -= len(piece)
        return number


def read_line(line: bytes, place: Callable[[], str]) -> Document:
    """A line of .jsonl."""
    try:
        return document_of(msgspec.json.decode(line, type=Line), place)
    except msgspec.ValidationError:
        raise SettingError(place(), NO_DOCUMENT, EXAMPLE_LINE) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise SettingError(place(), "is not JSON in UTF-8", EXAMPLE_LINE) from None
    except RecursionError:
        raise SettingError(place(), "is nested too deeply to be read", EXAMPLE_LINE) from None


def document_of(line: Line, place: Callable[[], str]) -> Document:
    """The document of a line or row: its text, or else its messages, or else its prompt and completion."""
    if line.text is not None:
        return Document(place, text=line.text)
    if line.messages is not None:
        for message in line.messages:
            if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                example = '{"messages": [{"role": "user", "content": "..."}]}'
                raise SettingError(place(), 'a message has no "role" or "content" that is a string', example)
        return Document(place, messages=line.messages)
    if line.prompt is not None and line.completion is not None:
        return Document(place, pair=(line.prompt, line.completion))
    raise SettingError(place(), NO_DOCUMENT, EXAMPLE_LINE)


def read_rows(part: Part) -> Iterator[Document]:
    """The rows of some row groups of a .parquet file, a few at a time."""
    parquet = open_parquet(Path(part.file))
    wanted = [name for name in Line.__struct_fields__ if name in parquet.schema_arrow.names]
    groups = [parquet.metadata.row_group(number).num_rows for number in range(part.stop)]
    number = sum(groups[: part.start])
    batches = parquet.iter_batches(ROWS, row_groups=list(range(part.start, part.stop)), columns=wanted)
    for rows in row_lists(part.file, number, batches):
        for row in rows:
            number += 1
            place = f"{part.file} row {number}"
            try:
                line = msgspec.convert(row, Line)
            except msgspec.ValidationError:
                raise SettingError(place, NO_DOCUMENT, "a column of strings named text") from None
            # A list of tables is filled up with what other rows have: a template would take None for a value.
            messages = line.messages and [{k: v for k, v in m.items() if v is not None} for m in line.messages]
            yield document_of(msgspec.structs.replace(line, messages=messages), lambda place=place: place)


def row_lists(file: str, before: int, batches: Iterator[Any]) -> Iterator[list[Any]]:
    """The rows of each batch, of which `before` come before. pyarrow reads and checks what it is asked for only now."""
    import pyarrow

    while True:
        try:
            rows = next(batches, None)
            if rows is None:
                return
            found = rows.to_pylist()
        except UnicodeDecodeError:
            where = f"{file} from row {before + 1} on"
            raise SettingError(where, "holds a string that is not UTF-8", "strings in UTF-8") from None
        except pyarrow.ArrowException as error:
            raise SettingError(file, f"is damaged ({error})", "the whole file, or a folder without it") from None
        before += len(found)
        yield found


def read_module(part: Part) -> Iterator[Document]:
    """A Python source file; nothing where it is not UTF-8 (the library keeps a few such files to test itself)."""
    content = Path(part.file).read_bytes()
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return
    yield Document(lambda: part.file, text=content)


def read_text(part: Part, tokenizer: Tokenizer) -> Iterator[Document]:
    """A part of a .txt file, in pieces."""
    file = Path(part.file)
    with file.open("rb") as content:
        yield from read_pieces(content, part.start, part.stop, file.stat().st_size, lambda: part.file, tokenizer)


def divided(document: Document, tokenizer: Tokenizer) -> Iterator[Document]:
    """A document, in pieces if its text is long: a tokenizer takes a hundred times a text's size of memory."""
    if document.text is None or len(document.text) <= PIECE_BYTES or not document.whole():
        yield document
        return
    text = document.text.encode() if isinstance(document.text, str) else document.text
    yield from read_pieces(BytesIO(text), 0, len(text), len(text), document.place, tokenizer)


def read_pieces(
    content: BinaryIO, start: int, stop: int, size: int, place: Callable[[], str], tokenizer: Tokenizer
) -> Iterator[Document]:
    """Bytes `start` to `stop` of a text of `size`, in pieces that give the tokens of the whole."""
    places = range(start, stop, PIECE_BYTES) if tokenizer.divides != "never" else [0]
    cuts = [find_cut(content, wanted, size, tokenizer) for wanted in (*places, stop)]
    for begin, end in pairwise(cuts):
        if begin < size:
            content.seek(begin)
            yield Document(place, text=content.read(end - begin), begins=begin == 0, ends=end == size)


def find_cut(content: BinaryIO, wanted: int, size: int, tokenizer: Tokenizer) -> int:
    """The first place from `wanted` on where the text can be divided; the file's end where there is none.

    Depends on the text alone, so that whoever reads the part before and whoever reads the part behind agree.
    """
    if wanted in (0, size) or tokenizer.divides == "anywhere":
        return wanted
    for place in range(wanted, size, PIECE_BYTES):
        begin = max(0, place - WINDOW_BYTES)
        content.seek(begin)
        text = content.read(SEARCH_BYTES + 2 * WINDOW_BYTES)
        # Tokenizers tie a space to the word behind it, and white space to more of it: only before its first is a seam.
        seams = SEAM.finditer(text, place - begin, place - begin + SEARCH_BYTES)
        for seam in islice(seams, TRIES):
            if parts_at(text, seam.start(), tokenizer):
                return begin + seam.start()
    return size


def parts_at(text: bytes, at: int, tokenizer: Tokenizer) -> bool:
    """Whether the text around a place gives the same tokens together and in two."""
    left, right = text[max(0, at - WINDOW_BYTES) : at], text[at : at + WINDOW_BYTES]
    # Only at the outer ends can a character be cut; what else is no text is found, and said, when it is encoded.
    return same_apart(tokenizer, left.decode(errors="ignore"), right.decode(errors="ignore"))
