"""From a profiler's trace file to its events: of any size, by any version of PyTorch, and JAX's too."""

from collections import Counter
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

from meshwright.record.kineto.about import about_trace, parsed_ranks
from meshwright.record.kineto.columns import Columns, Gathering, Place, TooMuchError
from meshwright.record.kineto.event import Arguments
from meshwright.record.kineto.stream import CHUNK_BYTES, Source, batches, open_source
from meshwright.record.kineto.trace import Trace
from meshwright.record.kineto.wire import Decoder, WireArguments, WireEvent

# Values beside the events that are used.
WANTED = ("distributedInfo", "deviceProperties", "baseTimeNanoseconds", "host_name")

# Categories that are always taken, as Kineto names them today.
TAKEN = frozenset(
    ("cpu_op", "user_annotation", "kernel", "gpu_memcpy", "gpu_memset", "cuda_runtime", "cuda_driver", "cuda_sync")
)
# Those that no reader uses: Python's frames, which are most of a trace that has them, and what repeats others.
PYTHON = "python_function"
UNUSED = frozenset((PYTHON, "Trace", "gpu_user_annotation", "cpu_instant_event"))
# What Kineto called categories until torch 1.12, and HIP's calls.
RENAMED = {
    "Operator": "cpu_op",
    "Kernel": "kernel",
    "Memcpy": "gpu_memcpy",
    "Memset": "gpu_memset",
    "Runtime": "cuda_runtime",
    "hip_runtime": "cuda_runtime",
}
# Then, annotations were operators: these are torch's own.
ANNOTATIONS = ("ProfilerStep#", "Optimizer.", "enumerate(DataLoader)#")

# Events without a duration, by their phase in Chrome's format.
PHASES = {
    "s": "flow",
    "t": "flow",
    "f": "flow",
    "i": "instant",
    "I": "instant",
    "C": "counter",
    "B": "begin",
    "E": "end",
    "M": "metadata",
}

# Microseconds: 285 years, and a float holds whole ones exactly.
FURTHEST = 2.0**53

# Of a hundred events, how many may be unreadable before the whole is not trusted.
MOST_LOST = 0.01


def read_trace(path: Path, *, python: bool = False, chunk_bytes: int = CHUNK_BYTES) -> Trace:
    """A trace as torch.profiler's export_chrome_trace or JAX's profiler wrote it, packed by gzip or not.

    python: keep Python's frames (with_stack=True, JAX's host tracer), which no account uses. chunk_bytes: read at once.
    Raises SettingError if the file is no such trace, is damaged or cut short, or holds more than there is room for.
    """
    with open_source(path, chunk_bytes) as source:
        reading = Reading(source, python)
        try:
            reading.read()
            return reading.trace()
        except TooMuchError as error:
            raise source.error(f"holds {error}", "a trace of fewer steps: schedule(wait=..., active=2)") from error


class Reading:
    """One file on its way to a trace."""

    def __init__(self, source: Source, python: bool) -> None:
        self._source = source
        self._unused = UNUSED - {PYTHON} if python else UNUSED
        self._decoder = Decoder()
        self._events = Gathering()
        self._beside: dict[str, bytes] = {}
        self._processes: dict[str, str] = {}
        self._threads: dict[tuple[str, str], str] = {}
        self._dropped: Counter[str] = Counter()
        self._lost = self._timeless = 0
        self._notes: list[str] = []

    def read(self) -> None:
        """The whole file."""
        source = self._source
        first = source.peek()
        if not first:
            raise source.error("is empty")
        if first not in (b"{", b"["):
            raise source.error("is not JSON")
        source.at += 1
        if first == b"[":
            self._read_events(is_bare=True)
        elif not self._read_object():
            raise source.error('is JSON, but no profiler trace: it has no "traceEvents"')
        if source.peek():
            raise source.error(f"something else follows the trace, after {source.position():,} bytes")

    def _read_object(self) -> bool:
        """Events, and what stands beside them in any order. False if there are no events."""
        source, found = self._source, False
        while not source.take(b"}"):
            if source.take(b","):
                continue
            key = source.value().strip(b'"').decode("utf-8", "replace")
            if not source.take(b":"):
                raise source.error(f"is not JSON: no value follows the key {key[:40]!r}")
            if key == "traceEvents":
                if not source.take(b"["):
                    raise source.error('is no profiler trace: its "traceEvents" are no list')
                self._read_events(is_bare=False)
                found = True
            elif key in WANTED:
                self._beside[key] = source.value()
            else:
                source.skip()
        return found

    def _read_events(self, *, is_bare: bool) -> None:
        """The list of events; its "[" was passed."""
        for events in batches(self._source, self._decoder, self._lose, may_lack_end=is_bare):
            kept = [
                event
                for event in events
                if event.ph == "X"
                and -FURTHEST < event.ts < FURTHEST
                and 0 <= event.dur < FURTHEST
                and (event.cat in TAKEN or self._takes(event))
            ]
            if len(kept) < len(events):
                self._leave_out(events, kept)
            self._events.add(kept)

    def _takes(self, event: WireEvent) -> bool:
        """Whether to keep a complete event of a category that is not always kept. Gives it its name of today."""
        if event.cat in RENAMED:
            is_mark = event.cat == "Operator" and str(event.name).startswith(ANNOTATIONS)
            event.cat = "user_annotation" if is_mark else RENAMED[event.cat]
        elif not event.cat and str(event.name).startswith("$"):
            # JAX marks Python's frames so.
            event.cat = PYTHON
            if PYTHON not in self._unused:
                event.cat = ""
                return True
        return event.cat not in self._unused

    def _leave_out(self, events: Sequence[WireEvent], kept: Sequence[WireEvent]) -> None:
        """Count what is not kept by its category, and take from it what names something."""
        others = [event for event in events if event.ph != "X"]
        for phase, number in Counter(map(attrgetter("ph"), others)).items():
            self._dropped[PHASES.get(phase, "other phases")] += number
        for event in others:
            if event.ph == "M":
                self._name(event)
        if len(others) + len(kept) < len(events):
            category_of = attrgetter("cat")
            lacking = Counter(category_of(event) for event in events if event.ph == "X")
            lacking.subtract(map(category_of, kept))
            for category, number in lacking.items():
                if category in self._unused:
                    self._dropped[category] += number
                else:
                    self._timeless += number

    def _name(self, event: WireEvent) -> None:
        """Take from a metadata event what its process or thread is called."""
        process, name = str(event.pid), str(event.args.name)
        if event.name == "process_name":
            self._events.room.take((process, name))
            self._processes[process] = name
        elif event.name == "thread_name":
            self._events.room.take((process, name))
            self._threads[process, str(event.tid)] = name

    def _lose(self, number: int) -> None:
        self._lost += number

    def trace(self) -> Trace:
        """What was read."""
        events, total = self._events, len(self._events)
        if self._lost > MOST_LOST * total:
            raise self._source.error(f"{self._lost:,} of its {total + self._lost:,} events are not JSON")
        if not total:
            raise self._source.error("holds no events with a begin and a duration")
        for number, what in ((self._lost, "are not JSON"), (self._timeless, "have no time that can be meant")):
            if number:
                self._notes.append(f"{number:,} events of the trace {what}: left out.")
        if self._source.lacks_end:
            self._notes.append("The trace does not say where it ends: if it was cut short, behind a whole event.")
        arguments = events.arguments(shown)
        about = about_trace(self._beside, events.first_us(), arguments)
        columns = events.sorted(self._shown_places(events.places()), arguments)
        return Trace(
            path=str(self._source.path),
            about=about,
            columns=columns,
            producer=self._producer(columns),
            dropped=dict(self._dropped),
            notes=tuple(self._notes),
        )

    def _producer(self, columns: Columns) -> str:
        """Whose profiler wrote this, by what only its events have."""
        if any(name.startswith(("/host:", "/device:")) for name in self._processes.values()):
            return "xla"
        return "kineto" if any(columns.categories()) else ""

    def _shown_places(self, places: Sequence[Place]) -> list[Place]:
        """Process and thread by name where events have no category: XLA numbers both at random."""
        twice = Counter((process, name) for (process, _), name in self._threads.items())
        found: list[Place] = []
        for category, process, thread in places:
            if category:
                found.append((category, process, thread))
                continue
            name = self._threads.get((process, thread), thread)
            alone = twice[process, name] < 2
            found.append(("", self._processes.get(process, process), name if alone else f"{name} ({thread})"))
        return found


def shown(args: WireArguments) -> Arguments:
    """Arguments as readers see them."""
    return Arguments(
        stream=args.stream,
        collective=str(args.collective),
        group=str(args.group),
        description=str(args.description),
        ranks=parsed_ranks(args.ranks),
        elements=args.elements,
        dtype=str(args.dtype),
        source=args.source,
        target=args.target,
        launch_shape=f"{list(args.grid)} {list(args.block)}" if args.grid or args.block else "",
        hlo=str(args.hlo),
        module=str(args.module),
        device=args.device,
        run=args.run,
        step=args.step,
    )
