"""Events as they stand in a trace file: decoded with types where these are as they should be, mended where not."""

import math
import re
from collections.abc import Callable
from typing import Annotated, Any

import msgspec

LOWEST, HIGHEST = -(2**63), 2**63 - 1
Int64 = Annotated[int, msgspec.Meta(ge=LOWEST, le=HIGHEST)]
Word = str | int

KEYS = {
    "external": "External id",
    "sequence": "Sequence number",
    "collective": "Collective name",
    "group": "Process Group Name",
    "description": "Process Group Description",
    "ranks": "Process Group Ranks",
    "elements": "In msg nelems",
    "source": "Src Rank",
    "target": "Dst Rank",
    "hlo": "hlo_op",
    "module": "hlo_module",
    "device": "device_ordinal",
    "run": "run_id",
    "step": "step_num",
}

# What other writers call the same: device events before torch 2.1, and XLA.
OTHER_KEYS = {b'"external id"': b'"External id"', b'"correlation_id"': b'"correlation"'}


class WireArguments(msgspec.Struct, frozen=True, kw_only=True, gc=False, rename=KEYS):
    """An event's `args`. name: of a process or a thread, in the events that name them."""

    correlation: Int64 = -1
    external: Int64 = -1
    sequence: Int64 = -1
    stream: Int64 = -1
    collective: Word = ""
    group: Word = ""
    description: Word = ""
    ranks: str | tuple[int, ...] = ""
    elements: Int64 = -1
    dtype: Word = ""
    source: Int64 = -1
    target: Int64 = -1
    grid: tuple[int, ...] = ()
    block: tuple[int, ...] = ()
    hlo: Word = ""
    module: Word = ""
    device: Int64 = -1
    run: Int64 = -1
    step: Int64 = -1
    name: Word = ""


class WireEvent(msgspec.Struct, kw_only=True, gc=False):
    """An event. Times in microseconds; ts is not a number where there is none."""

    ph: str = ""
    cat: str = ""
    name: str = ""
    pid: Word = ""
    tid: Word = ""
    ts: float = math.nan
    dur: float = 0.0
    args: WireArguments = WireArguments()


# The same with anything anywhere. What is no struct is not looked into.
Leaf = list[Any] | str | int | float | bool | None
LooseArguments = msgspec.defstruct(
    "LooseArguments", [(name, Any, None) for name in WireArguments.__struct_fields__], kw_only=True, rename=KEYS
)
LooseEvent = msgspec.defstruct(
    "LooseEvent",
    [
        *((name, Any, None) for name in WireEvent.__struct_fields__ if name != "args"),
        ("args", LooseArguments | Leaf, None),
    ],
    kw_only=True,
)

# Numbers that JSON does not have: bandwidths of copies that took no time (github.com/pytorch/kineto/issues/105).
NO_NUMBER = re.compile(rb"([:,\[]\s*+)[-+]?(?:nan|NaN|inf|Infinity)(?=\s*[,\]}])")
# Backslashes of paths on Windows, which are not escaped (github.com/pytorch/pytorch/issues/98432).
BACKSLASH = re.compile(rb'\\(["\\/bfnrt]|u[0-9a-fA-F]{4})?')
# Line ends and the like in strings (github.com/pytorch/pytorch/issues/130622): between values a space does as well.
CONTROL = bytes(32 if code < 32 else code for code in range(256))


class Decoder:
    """Decodes the text of lists of events."""

    def __init__(self) -> None:
        self._typed = msgspec.json.Decoder(list[WireEvent], strict=False)
        self._loose: msgspec.json.Decoder[list[Any]] = msgspec.json.Decoder(list[LooseEvent | Leaf], strict=False)

    def __call__(self, text: bytes) -> list[WireEvent]:
        """The events in the text of a list, without its brackets. Raises ValueError or RecursionError."""
        text = text.rstrip(b", \t\r\n")
        for other, key in OTHER_KEYS.items():
            text = text.replace(other, key)
        try:
            return self._decode(b"[%b]" % text)
        except ValueError:
            mended = mend(text)
            if mended == text:
                raise
            return self._decode(b"[%b]" % mended)

    def _decode(self, text: bytes) -> list[WireEvent]:
        try:
            return self._typed.decode(text)
        except (msgspec.ValidationError, UnicodeError):
            return [fitted(event) for event in self._loose.decode(text) if isinstance(event, LooseEvent)]


def mend(text: bytes) -> bytes:
    """The text without what profilers write that is no JSON."""
    if not text.isascii():
        text = text.decode("utf-8", "replace").encode()
    text = BACKSLASH.sub(lambda found: found[0] if found[1] else rb"\\", text)
    return NO_NUMBER.sub(rb"\1null", text.translate(CONTROL))


def fitted(event: Any) -> WireEvent:
    """An event of which anything may be of any type: what cannot be meant is left out, as if it were not there."""
    args = event.args if isinstance(event.args, LooseArguments) else LooseArguments()
    return WireEvent(
        ph=event.ph if isinstance(event.ph, str) else "",
        cat=event.cat if isinstance(event.cat, str) else "",
        name=word(event.name),
        pid=word(event.pid),
        tid=word(event.tid),
        ts=number(event.ts),
        dur=0.0 if event.dur is None else number(event.dur),
        args=WireArguments(**{name: FITTING[name](getattr(args, name)) for name in WireArguments.__struct_fields__}),
    )


def word(value: object) -> str:
    """A string that may have been written as a number; empty where it is neither."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else ""


def number(value: object) -> float:
    """A number that may have been written as a string; not a number where it is neither."""
    try:
        return float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return math.nan


def integer(value: object) -> int:
    """A whole number of 64 bits that may have been written as a string; -1 where it is none."""
    if isinstance(value, str):
        try:
            value = int(value) if len(value) <= len(str(LOWEST)) else -1
        except ValueError:
            return -1
    whole = value if isinstance(value, int) else int(value) if isinstance(value, float) and value.is_integer() else -1
    return int(whole) if LOWEST <= whole <= HIGHEST and not isinstance(value, bool) else -1


def integers(value: object) -> tuple[int, ...]:
    """A list of whole numbers; empty where it is none."""
    return tuple(integer(part) for part in msgspec.convert(value, list[Any])) if isinstance(value, list) else ()


def ranks(value: object) -> str | tuple[int, ...]:
    """Ranks, in a list or as its text."""
    return value if isinstance(value, str) else integers(value)


FITTING: dict[str, Callable[[object], Any]] = {
    **dict.fromkeys(WireArguments.__struct_fields__, integer),
    **dict.fromkeys(("collective", "group", "description", "dtype", "hlo", "module", "name"), word),
    "ranks": ranks,
    "grid": integers,
    "block": integers,
}
