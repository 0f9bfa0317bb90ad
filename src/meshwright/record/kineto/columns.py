"""Millions of events in little memory: columns of numbers, and every name once."""

from array import array
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import compress, count, islice
from operator import attrgetter, eq, le
from typing import Any, cast

from msgspec.structs import replace

from meshwright.record.kineto.event import Arguments, Event
from meshwright.record.kineto.wire import WireArguments, WireEvent

# Of 52 bytes each, and sorting them takes as much again: 2 GB.
MOST_EVENTS = 16_000_000
# Names, and combinations of arguments, that differ, with about what Python needs to keep one.
MOST_NAME_BYTES = 256 << 20
NAME_BYTES = 200

# Events that are looked at together when one that lasts into a stretch is sought before it.
BLOCK = 1024

# Arguments that take few values. The others differ from event to event.
OWN = ("correlation", "external", "sequence")
SHARED = tuple(name for name in WireArguments.__struct_fields__ if name not in OWN and name != "name")
shared_of = attrgetter(*SHARED)

NUMBERS = ("name", "place", "rest", *OWN)

Place = tuple[str, str, str]
Row = tuple[float, float, int, int, int, int, int, int]


class TooMuchError(Exception):
    """More than there is room for; its text says of what."""


class Room:
    """What is left of the memory for names."""

    def __init__(self) -> None:
        self._left = MOST_NAME_BYTES

    def take(self, name: object) -> None:
        """For one more name, or several in a tuple. Raises TooMuchError if nothing is left."""
        # Four bytes a character at most. Other parts of a name are numbers, and lists of them.
        parts = cast(tuple[object, ...], name) if isinstance(name, tuple) else (name,)
        self._left -= NAME_BYTES + sum(4 * len(part) for part in parts if isinstance(part, str))
        self._left -= sum(40 * len(cast(tuple[int, ...], part)) for part in parts if isinstance(part, tuple))
        if self._left < 0:
            raise TooMuchError("more different names than any program has")


class Numbers(dict[object, int]):
    """A number for each different key, counted from 0 as they are first looked up."""

    def __init__(self, room: Room) -> None:
        super().__init__()
        self._room = room

    def __missing__(self, key: object) -> int:
        self._room.take(key)
        number = self[key] = len(self)
        return number


class Gathering:
    """Events as they are read, in any order. Times are the file's, in microseconds."""

    def __init__(self) -> None:
        self.room = Room()
        self._names, self._places, self._shared = (Numbers(self.room) for _ in range(3))
        self._times = {name: array("d") for name in ("start", "end")}
        self._numbers = {name: array("I") for name in ("name", "place", "rest")}
        self._numbers |= {name: array("q") for name in OWN}

    def __len__(self) -> int:
        return len(self._times["start"])

    def add(self, events: Sequence[WireEvent]) -> None:
        """Complete events, with times that are numbers. Raises TooMuchError."""
        if len(self) + len(events) > MOST_EVENTS:
            raise TooMuchError(f"more than {MOST_EVENTS:,} events")
        args = [event.args for event in events]
        self._times["start"].extend(map(attrgetter("ts"), events))
        self._times["end"].extend([event.ts + event.dur for event in events])
        numbers = self._numbers
        numbers["name"].extend(map(self._names.__getitem__, map(attrgetter("name"), events)))
        numbers["place"].extend(map(self._places.__getitem__, map(attrgetter("cat", "pid", "tid"), events)))
        numbers["rest"].extend(map(self._shared.__getitem__, map(shared_of, args)))
        for name in OWN:
            numbers[name].extend(map(attrgetter(name), args))

    def places(self) -> list[Place]:
        """Category, process and thread of the events, as the file has them."""
        return [(str(cat), str(pid), str(tid)) for cat, pid, tid in self._places]  # type: ignore[misc]

    def arguments(self, shown: Callable[[WireArguments], Arguments]) -> list[Arguments]:
        """The arguments that events share, each combination once, as readers see them."""
        return [shown(WireArguments(**dict(zip(SHARED, values, strict=True)))) for values in self._shared]  # type: ignore[arg-type]

    def first_us(self) -> float:
        """Begin of the first event, on the file's clock."""
        return min(self._times["start"], default=0.0)

    def sorted(self, places: list[Place], arguments: list[Arguments]) -> "Columns":
        """The events in order; this object is empty afterwards. `places` and `arguments` as readers see them."""
        first = self.first_us()
        order = order_of(self._times["start"], self._times["end"])
        times = {
            name: array("d", ((column[at] - first) * 1e-6 for at in order))
            for name, column in ((name, self._times.pop(name)) for name in tuple(self._times))
        }
        numbers = {
            name: array(column.typecode, map(column.__getitem__, order))
            for name, column in ((name, self._numbers.pop(name)) for name in tuple(self._numbers))
        }
        return Columns(times, numbers, [str(name) for name in self._names], places, arguments)


def order_of(start: "array[float]", end: "array[float]") -> "array[int]":
    """Indices by `start`; of those that start together the later `end` first, and else as they are."""
    is_ordered = all(map(le, start, islice(start, 1, None)))
    order = array("I", range(len(start)) if is_ordered else sorted(range(len(start)), key=start.__getitem__))
    begins = array("d", map(start.__getitem__, order))
    at = -1
    for same in compress(count(), map(eq, begins, islice(begins, 1, None))):
        if same < at:
            continue
        at = same
        while at < len(begins) and begins[at] == begins[same]:
            at += 1
        order[same:at] = array("I", sorted(order[same:at], key=end.__getitem__, reverse=True))
    return order


class Columns:
    """Events by their begin. Times are seconds from the first one's begin."""

    def __init__(
        self,
        times: dict[str, "array[float]"],
        numbers: dict[str, "array[int]"],
        names: list[str],
        places: list[Place],
        arguments: list[Arguments],
    ) -> None:
        self._start, self._end = times["start"], times["end"]
        self._numbers = numbers
        self._names, self._places, self._arguments = names, places, arguments
        ends = self._end
        self._latest = array("d", (max(ends[at : at + BLOCK]) for at in range(0, len(ends), BLOCK)))

    def __len__(self) -> int:
        return len(self._start)

    def end_s(self) -> float:
        """When the last event to end does."""
        return max(self._latest, default=0.0)

    def categories(self) -> set[str]:
        """Of all events; "" of those that have none."""
        return {category for category, _, _ in self._places}

    def within(self, start_s: float, end_s: float, categories: Collection[str] | None) -> list[Event]:
        """As Trace.within."""
        first, last = bisect_left(self._start, start_s), bisect_left(self._start, end_s)
        chosen: Sequence[int] = range(first, max(first, last))
        if lasting := self._lasting(first, start_s):
            chosen = [*lasting, *chosen]
        if categories is not None:
            wanted = {place for place, (category, *_) in enumerate(self._places) if category in categories}
            place = self._numbers["place"]
            chosen = [at for at in chosen if place[at] in wanted]
        return self._events(chosen)

    def _lasting(self, first: int, moment: float) -> list[int]:
        """Events before the one at `first` that end after a moment."""
        found: list[int] = []
        for block, latest in enumerate(islice(self._latest, (first + BLOCK - 1) // BLOCK)):
            if latest > moment:
                begin = block * BLOCK
                ends = self._end[begin : min(begin + BLOCK, first)]
                found.extend(begin + at for at, end in enumerate(ends) if end > moment)
        return found

    def marks(self) -> list[Event]:
        """As Trace.marks."""
        notes = {place for place, (category, *_) in enumerate(self._places) if category == "user_annotation"}
        steps = {rest for rest, args in enumerate(self._arguments) if args.step >= 0}
        chosen = set(compress(count(), map(notes.__contains__, self._numbers["place"])))
        chosen.update(compress(count(), map(steps.__contains__, self._numbers["rest"])) if steps else ())
        return self._events(sorted(chosen))

    def _events(self, chosen: Sequence[int]) -> list[Event]:
        """The events of these indices."""
        names, places, arguments = self._names, self._places, self._arguments
        found: list[Event] = []
        for start, end, name, place, rest, correlation, external, sequence in self._rows(chosen):
            category, process, thread = places[place]
            args = arguments[rest]
            if correlation != -1 or external != -1 or sequence != -1:
                args = replace(args, correlation=correlation, external=external, sequence=sequence)
            found.append(
                Event(
                    name=names[name],
                    category=category,
                    process=process,
                    thread=thread,
                    start_s=start,
                    end_s=end,
                    args=args,
                )
            )
        return found

    def _rows(self, chosen: Sequence[int]) -> Iterator[Row]:
        """Their columns, side by side."""
        columns: list[array[Any]] = [self._start, self._end, *(self._numbers[name] for name in NUMBERS)]
        if isinstance(chosen, range):
            return zip(*(column[chosen.start : chosen.stop] for column in columns), strict=True)
        return zip(*(map(column.__getitem__, chosen) for column in columns), strict=True)
