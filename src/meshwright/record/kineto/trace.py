"""A profiler trace as the readers of it see one: events by time, and what stands beside them."""

from collections.abc import Collection, Sequence

from meshwright.record.kineto.about import About
from meshwright.record.kineto.columns import Columns
from meshwright.record.kineto.event import Arguments, Event

__all__ = ["Arguments", "Event", "Trace"]


class Trace:
    """One rank's trace. Times are seconds from the begin of its first event.

    rank: -1 where the trace does not say; world_size: 0. base_s: the epoch's second at which its clock begins (0 where
    unknown), by which the clocks of several ranks of one host are compared. producer: "kineto" or "xla", whose profiler
    wrote it; "" where it is neither. groups: description and ranks of each process group, by the name that events use.
    host and device: the machine's name and its accelerator's, "" where the trace does not say. dropped: categories of
    events that were left out, with their number. notes: what a reader of the account should know, in sentences.
    """

    def __init__(
        self,
        *,
        path: str,
        about: About,
        columns: Columns,
        producer: str,
        dropped: dict[str, int],
        notes: tuple[str, ...],
    ) -> None:
        self.path = path
        self.rank = about.rank
        self.world_size = about.world_size
        self.base_s = about.base_s
        self.producer = producer
        self.groups = about.groups
        self.host = about.host
        self.device = about.device
        self.notes = notes
        self.dropped = dropped
        self._columns = columns

    def __len__(self) -> int:
        """Number of events, without those that were left out."""
        return len(self._columns)

    @property
    def end_s(self) -> float:
        """When the last event to end does, seconds. The first one begins at 0."""
        return self._columns.end_s()

    def marks(self) -> Sequence[Event]:
        """All annotations on the host in order of time: Kineto's user_annotation, XLA's numbered steps."""
        return self._columns.marks()

    def within(self, start_s: float, end_s: float, categories: Collection[str] | None = None) -> Sequence[Event]:
        """Events that begin in [start_s, end_s), or before and last into it, by their begin, the longer first.

        categories: only these. The list holds some 400 bytes an event: take a long stretch of a large trace apart.
        """
        return self._columns.within(start_s, end_s, categories)
