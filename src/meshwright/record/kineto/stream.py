"""The bytes of a trace file, piece by piece: where its values begin and end, in memory that does not grow with it."""

import gzip
import os
import re
import stat
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

from meshwright.spec import SettingError

Item = TypeVar("Item")

# Bytes that are decoded at once: larger ones are not faster.
CHUNK_BYTES = 4 << 20
# One event, or one value beside the events. Operators over thousands of tensors, with all their shapes, take kilobytes.
LARGEST_BYTES = 16 << 20
# Profilers' traces shrink to a tenth or a twentieth. Deflate can do 1032 to 1 at most: what comes near is made to.
MOST_SHRUNK, FREE_BYTES = 200, 64 << 20

# The same file, or one like it, that would be read.
WHOLE = "a whole trace, as torch.profiler's export_chrome_trace or jax.profiler.trace writes it"

# What has a bearing on where values end: strings, the last perhaps cut off by the end of the buffer, and brackets.
TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:(")|\\?\Z)|[\[\]{}]', re.DOTALL)
SCALAR = re.compile(rb"[^\s,\[\]{}\"]++")
FILLING = re.compile(rb"[\s,]*+")
BLANK = re.compile(rb"\s*+")
BETWEEN = re.compile(rb"\}(?=\s*,\s*\{)")
CLOSING = re.compile(rb"\}\s*,?\s*(?=\])")
# Between two events as all profilers write them, which begin with their phase; inside of an event it is not found.
SURELY_BETWEEN = re.compile(rb'\}(?=\s*,\s*\{\s*"ph"\s*:)')

# Where to look for the end of the last whole event, and how many places to try.
TAIL_BYTES, TRIES = 64 << 10, 3

MALFORMED = (ValueError, RecursionError)


class Source:
    """A file that is read once, front to back. `buffer` from `at` on is what was read and not yet used.

    Raises SettingError, which names the file, for all that is wrong with it.
    """

    def __init__(self, path: Path, raw: BinaryIO, file: BinaryIO, chunk_bytes: int) -> None:
        self.path = path
        self.chunk_bytes = chunk_bytes
        self.buffer = b""
        self.at = 0
        self.ended = False
        self.lacks_end = False
        self.read_bytes = 0
        # The file as it lies on disk, and its text, which is the same if it is not packed.
        self._raw, self._file = raw, file

    def error(self, reason: str, nearest: str = WHOLE) -> SettingError:
        """What is wrong with this file, to be raised."""
        return SettingError(str(self.path), reason, nearest)

    def position(self) -> int:
        """Bytes of text before what comes next."""
        return self.read_bytes - len(self.buffer) + self.at

    def cut_short(self) -> SettingError:
        """The file ends where more must come."""
        # Kineto writes all host events, then the device's: half a trace of a GPU looks like an idle one, and an account
        # made from it would be wrong in a way that nothing in it shows.
        return self.error(
            f"the trace is cut short after {self.read_bytes:,} bytes; profilers do not write in order of time, so that "
            "what is left would give a wrong account"
        )

    def fill(self, wanted: int) -> bool:
        """Read until `wanted` bytes are at hand. False if the file ends before."""
        missing = wanted - (len(self.buffer) - self.at)
        if missing > 0 and not self.ended:
            pieces = [self.buffer[self.at :]]
            while missing > 0 and not self.ended:
                piece = self._read(max(missing, self.chunk_bytes))
                missing -= len(piece)
                pieces.append(piece)
            self.buffer, self.at = b"".join(pieces), 0
        return missing <= 0

    def _read(self, count: int) -> bytes:
        """At least one byte, unless the file ends."""
        try:
            piece = self._file.read(count)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise self.error(f"its gzip data is damaged or cut short: {error}") from error
        except OSError as error:
            raise self.error(f"cannot be read: {error.strerror}") from error
        self.read_bytes += len(piece)
        self.ended = not piece
        if self._file is not self._raw and self.read_bytes > FREE_BYTES + MOST_SHRUNK * self._raw.tell():
            raise self.error(f"unpacks to more than {MOST_SHRUNK} times its size: no profiler's trace does")
        return piece

    def peek(self) -> bytes:
        """The next byte that is no white space, left in place; nothing at the end of the file."""
        while True:
            found = BLANK.match(self.buffer, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self.buffer):
                return self.buffer[self.at : self.at + 1]
            if not self.fill(1):
                return b""

    def take(self, expected: bytes) -> bool:
        """Go past the next byte, if it is one of `expected`."""
        found = self.peek()
        if not found:
            raise self.cut_short()
        if found in expected:
            self.at += 1
            return True
        return False

    def value(self) -> bytes:
        """Go past the next value, of any kind, and return its text."""
        if not self.peek():
            raise self.cut_short()
        wanted = 1 << 10
        while True:
            whole = not self.fill(wanted)
            end = end_of_value(self.buffer, self.at, whole)
            if end >= 0:
                text = self.buffer[self.at : end]
                self.at = end
                return text
            if whole:
                raise self.cut_short()
            if wanted >= LARGEST_BYTES:
                raise self.too_large()
            wanted = min(wanted * 4, LARGEST_BYTES)

    def skip(self) -> None:
        """Go past the next value, which may be of any size, as long as its strings are not."""
        if self.peek() not in (b"[", b"{"):
            self.value()
            return
        depth, wanted = 0, self.chunk_bytes
        while True:
            whole = not self.fill(wanted)
            used = len(self.buffer)
            for token in TOKEN.finditer(self.buffer, self.at):
                if token[0] in (b"{", b"["):
                    depth += 1
                elif token[0] in (b"}", b"]"):
                    depth -= 1
                    if depth == 0:
                        self.at = token.end()
                        return
                elif not token[1]:
                    used = token.start()
            if whole:
                raise self.cut_short()
            if used > self.at:
                self.at, wanted = used, self.chunk_bytes
            elif wanted >= LARGEST_BYTES:
                raise self.too_large()
            else:
                wanted = min(wanted * 4, LARGEST_BYTES)

    def too_large(self) -> SettingError:
        """The next value does not end soon enough."""
        return self.error(f"holds a single value of more than {LARGEST_BYTES >> 20} MiB")


@contextmanager
def open_source(path: Path, chunk_bytes: int = CHUNK_BYTES) -> Generator[Source]:
    """The file, unpacked if it begins as gzip does, whatever it is called."""
    with open_file(path) as raw:
        try:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
        except OSError as error:
            raise SettingError(str(path), f"cannot be read: {error.strerror}", WHOLE) from error
        with gzip.GzipFile(fileobj=raw) if packed else nullcontext(raw) as file:
            source = Source(path, raw, cast(BinaryIO, file), chunk_bytes)
            if source.fill(3) and source.buffer.startswith(b"\xef\xbb\xbf"):
                source.at = 3
            yield source


def open_file(path: Path) -> BinaryIO:
    """The file for reading, if it is one: a pipe would block, and a device might never end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else str(error)) or str(error)
        raise SettingError(str(path), f"cannot be read: {reason}", WHOLE) from error
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISREG(kind):
        return os.fdopen(descriptor, "rb", buffering=1 << 20)
    os.close(descriptor)
    what = "a folder" if stat.S_ISDIR(kind) else "no regular file"
    raise SettingError(str(path), f"is {what}, not a trace", WHOLE)


def end_of_value(buffer: bytes, start: int, whole: bool) -> int:
    """Where the value that begins at `start` ends; -1 if not in this buffer. whole: nothing comes after it."""
    first = buffer[start : start + 1]
    if first in (b"{", b"["):
        ends, _ = ends_of_items(buffer, start, most=1)
        return ends[0] if ends else -1
    if first == b'"':
        found = TOKEN.match(buffer, start)
        return found.end() if found and found[1] else -1
    found = SCALAR.match(buffer, start)
    if found is None:
        # Nothing that a value may begin with. To go past it is enough: what it is part of does not decode.
        return start + 1
    return found.end() if whole or found.end() < len(buffer) else -1


def ends_of_items(buffer: bytes, start: int, most: int = -1) -> tuple[list[int], int]:
    """Where the objects and lists in a list end, whose text goes on at `start`, and where the list itself does.

    The second is -1 if that is not in the buffer. most: stop after that many.
    """
    depth = 0
    ends: list[int] = []
    for token in TOKEN.finditer(buffer, start):
        what = token[0]
        if what in (b"{", b"["):
            depth += 1
        elif what in (b"}", b"]"):
            if depth == 0:
                return ends, token.start()
            depth -= 1
            if depth == 0:
                ends.append(token.end())
                if len(ends) == most:
                    break
    return ends, -1


def batches(
    source: Source, decode: Callable[[bytes], list[Item]], lost: Callable[[int], None], *, may_lack_end: bool
) -> Iterator[list[Item]]:
    """The items of the list whose "[" was just passed, decoded, many at once; in the end its "]" is passed, too.

    decode: of the text of a list; what it cannot decode, raises one of MALFORMED. lost: is told of events that no one
    can decode. may_lack_end: the file may end behind an item, as Chrome's format allows where it is all one list.
    """
    wanted = source.chunk_bytes
    while True:
        source.fill(wanted)
        source.at = skip_filling(source.buffer, source.at)
        if source.at == len(source.buffer):
            if not source.ended:
                continue
            if may_lack_end:
                source.lacks_end = True
                return
            raise source.cut_short()
        # The last piece of a file most likely holds the end of the list, and none other does.
        if (found := decode_most(source, CLOSING if source.ended else BETWEEN, decode)) is not None:
            yield found
            wanted = source.chunk_bytes
            if source.ended:
                source.at += 1
                return
            continue
        ends, closed = ends_of_items(source.buffer, source.at)
        end = closed if closed >= 0 else ends[-1] if ends else source.at
        found = try_decode(source.buffer[source.at : end], decode)
        if found is not None and (ends or closed >= 0):
            yield found
            source.at = end
            wanted = source.chunk_bytes
            if closed >= 0:
                source.at += 1
                return
        elif found is None or source.ended or wanted >= LARGEST_BYTES:
            # Something in it is no JSON, and where the strings are is no longer sure.
            yield from decode_parts(source, decode, lost, ends, closed)
            wanted = source.chunk_bytes
        else:
            wanted = min(wanted * 4, LARGEST_BYTES)


def skip_filling(buffer: bytes, at: int) -> int:
    """Behind white space and commas."""
    found = FILLING.match(buffer, at)
    return found.end() if found else at


def decode_most(source: Source, end: "re.Pattern[bytes]", decode: Callable[[bytes], list[Item]]) -> list[Item] | None:
    """The buffer's items up to the last place that looks like `end`, if that is what it is.

    A cut inside of a string or of an event leaves text that does not decode, so whatever decodes was cut rightly.
    """
    tail = max(source.at, len(source.buffer) - TAIL_BYTES)
    cuts = [match.end() for match in end.finditer(source.buffer, tail)]
    for cut in cuts[: -TRIES - 1 : -1]:
        found = try_decode(source.buffer[source.at : cut], decode)
        if found is not None:
            source.at = cut
            return found
    return None


def try_decode(text: bytes, decode: Callable[[bytes], list[Item]]) -> list[Item] | None:
    """What decodes; None if it does not."""
    try:
        return decode(text)
    except MALFORMED:
        return None


def decode_parts(
    source: Source, decode: Callable[[bytes], list[Item]], lost: Callable[[int], None], ends: list[int], closed: int
) -> Iterator[list[Item]]:
    """What can be decoded of a buffer in which something cannot, event by event; the rest is reported as lost."""
    sure = [match.end() for match in SURELY_BETWEEN.finditer(source.buffer, source.at)]
    cuts = sure or ends
    if not cuts and closed < 0:
        if source.ended:
            raise source.cut_short()
        raise source.too_large()
    for cut in cuts or [closed]:
        part = source.buffer[skip_filling(source.buffer, source.at) : cut]
        found = try_decode(part, decode)
        if found is None:
            lost(1)
        else:
            yield found
        source.at = cut
