"""Process groups that carry nothing: one rank of a layout runs by itself, and transfers take the time they are given.

What would come from other ranks is made of the rank's own numbers, so that everything stays finite: what is gathered is
its own part in each place, what is summed or received is its own. On a GPU a transfer keeps a stream busy, as NCCL's
kernels do, beside the compute that does not wait for it; on a CPU, where gloo blocks, the call takes as long. Messages
between stages of a pipeline are there at once: when they would come is known to whoever replays the whole schedule.
"""

# torch's stubs name parameters otherwise from version to version, and hand them over by their places.
# pyright: reportIncompatibleMethodOverride=false, reportAssignmentType=false

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._profiler import _RecordFunctionFast
from torch.profiler import record_function

from meshwright.record.kineto import STAND_IN
from meshwright.record.rehearsal import Asked, Curve, GroupPace, Kind, seconds_at
from meshwright.spec import Cluster

BACKEND = "silent"
# Clock cycles for which a GPU is kept busy to learn how many of them make a second: some 10 ms.
CALIBRATION_CYCLES = 20_000_000
# What is received from other stages lies within this of zero: as small as states are at first, and finite.
SPREAD = 0.02
# What a profile has of gloo's collectives, by which they are known on a CPU.
OPERATORS: dict[Kind, str] = {
    "all_reduce": "c10d::allreduce_",
    "all_gather": "c10d::_allgather_base_",
    "reduce_scatter": "c10d::_reduce_scatter_base_",
    "all_to_all": "c10d::alltoall_base_",
    "pass": "c10d::alltoall_base_",
    "send": "c10d::send",
    "recv": "c10d::recv_",
}


class Ledger:
    """What the rank asked of its groups since the last `clear`."""

    def __init__(self) -> None:
        self._asked: dict[tuple[Kind, int], tuple[int, float, float]] = {}

    def clear(self) -> None:
        """Forget all."""
        self._asked.clear()

    def note(self, kind: Kind, ranks: int, size_bytes: float, seconds: float) -> None:
        """Add a transfer."""
        count, whole_bytes, whole_s = self._asked.get((kind, ranks), (0, 0.0, 0.0))
        self._asked[kind, ranks] = count + 1, whole_bytes + size_bytes, whole_s + seconds

    def asked(self) -> tuple[Asked, ...]:
        """All that is noted, what takes longest first."""
        found = [
            Asked(kind=kind, ranks=ranks, count=count, size_bytes=size_bytes, seconds=seconds)
            for (kind, ranks), (count, size_bytes, seconds) in self._asked.items()
        ]
        return tuple(sorted(found, key=lambda one: -one.seconds))


def start_silent(
    cluster: Cluster, rank: int, world_size: int, paces: Sequence[GroupPace]
) -> tuple[torch.device, Ledger]:
    """Be `rank` of a world of `world_size` without the others, on one device of the cluster's kind.

    Returns the device, and the book of what is asked of the groups. Once in a process, for torch keeps the backend.
    """
    ledger = Ledger()
    clock = build_clock(cluster)
    known = {pace.ranks: pace.curves for pace in paces}

    def create(options: Any, _backend_options: Any) -> SilentGroup:
        # torch names no ranks where it means all of them.
        ranks = tuple(sorted(options.global_ranks_in_group)) or tuple(range(world_size))
        return SilentGroup(options.group_rank, ranks, known, clock, ledger)

    dist.Backend.register_backend(BACKEND, create, extended_api=True, devices=["cpu", "cuda"])
    dist.init_process_group(BACKEND, store=dist.HashStore(), rank=rank, world_size=world_size)
    return clock.device, ledger


class Finished(dist.Work):
    """A transfer that was over when its call returned."""

    def wait(self, timeout: Any = None) -> bool:  # noqa: ARG002 (torch passes it)
        """Nothing to wait for."""
        return True

    def is_completed(self) -> bool:
        """Always."""
        return True


class OnDevice(Finished):
    """A transfer that goes on on the device. held: tensors whose memory must not be used anew meanwhile."""

    def __init__(self, event: torch.cuda.Event, held: Sequence[Tensor]) -> None:
        super().__init__()
        self._event, self._held = event, held

    def wait(self, timeout: Any = None) -> bool:  # noqa: ARG002
        """Let the current stream's coming work wait."""
        torch.cuda.current_stream().wait_event(self._event)
        self._held = ()
        return True

    def is_completed(self) -> bool:
        """Whether the device has come past it."""
        return self._event.query()


class HostClock:
    """Lets time pass on a CPU, in the call."""

    device = torch.device("cpu")

    def run(self, name: str, seconds: float, fill: Callable[[], object], *_: Any) -> dist.Work:
        """A transfer: `fill` makes what it gives, and both together last `seconds`, if they can."""
        until = time.perf_counter() + seconds
        # An operator to the profiler, as gloo's is, and no annotation.
        with _RecordFunctionFast(name):
            fill()
            time.sleep(max(0.0, until - time.perf_counter()))
        return Finished()

    def stream(self) -> None:
        """There is none."""


class DeviceClock:
    """Lets time pass on a GPU, on a stream."""

    def __init__(self, bytes_per_s: float) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._bytes_per_s = bytes_per_s
        torch.cuda._sleep(CALIBRATION_CYCLES)  # the first wakes the device up
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.cuda._sleep(CALIBRATION_CYCLES)
        end.record()
        end.synchronize()
        self._cycles_per_s = CALIBRATION_CYCLES / (begin.elapsed_time(end) * 1e-3)

    def stream(self) -> torch.cuda.Stream:
        """One that a group's transfers run on, one after another."""
        return torch.cuda.Stream(self.device)

    def run(
        self, name: str, seconds: float, fill: Callable[[], object], held: Sequence[Tensor], stream: torch.cuda.Stream
    ) -> dist.Work:
        """A transfer on `stream`, after what the current one has been given so far. held: what it reads and writes."""
        written_bytes = held[0].numel() * held[0].element_size() if held else 0
        left_s = seconds - written_bytes / self._bytes_per_s
        current = torch.cuda.current_stream()
        if stream != current:
            stream.wait_stream(current)
        with torch.cuda.stream(stream), record_function(name):
            fill()
            if left_s > 0:
                torch.cuda._sleep(round(left_s * self._cycles_per_s))
            event = torch.cuda.Event()
            event.record(stream)
        return OnDevice(event, held)


def build_clock(cluster: Cluster) -> HostClock | DeviceClock:
    """What lets time pass on the device of the cluster's kind that this process has."""
    if cluster.device.kind != "cuda":
        return HostClock()
    torch.cuda.set_device(0)
    torch.cuda.init()
    return DeviceClock(cluster.device.memory_bytes_per_s)


class SilentGroup(dist.ProcessGroup):
    """A group of which this process is the only member that runs.

    known: by ranks, how long transfers take; a group of one rank takes no time.
    """

    def __init__(
        self,
        rank: int,
        ranks: tuple[int, ...],
        known: dict[tuple[int, ...], dict[Kind, Curve]],
        clock: HostClock | DeviceClock,
        ledger: Ledger,
    ) -> None:
        super().__init__(rank, len(ranks))  # pyright: ignore[reportCallIssue] (another of torch's two)
        self._ranks, self._known, self._clock, self._ledger = ranks, known, clock, ledger
        self._stream = clock.stream()
        self._name = self._description = ""

    def getBackendName(self) -> str:
        """As torch asks."""
        return BACKEND

    # torch keeps a group's name with its backends, of which a group written in Python has none.

    def _set_group_name(self, name: str) -> None:
        self._name = name

    def _set_group_desc(self, description: str) -> None:
        self._description = description

    @property
    def group_name(self) -> str:
        """As torch numbers it."""
        return self._name

    @property
    def group_desc(self) -> str:
        """As the mesh calls it."""
        return self._description

    def _run(
        self,
        kind: Kind,
        size_bytes: float,
        fill: Callable[[], object],
        held: Sequence[Tensor],
        *,
        opts: Any = None,
        between: tuple[int, ...] = (),
    ) -> dist.Work:
        """A transfer of this group, or of the two ranks `between`."""
        ranks = between or self._ranks
        seconds = 0.0
        if len(ranks) > 1:
            seconds = seconds_at(self._known[ranks][kind], size_bytes)
            self._ledger.note(kind, len(ranks), size_bytes, seconds)
        if isinstance(self._clock, HostClock):
            return self._clock.run(OPERATORS[kind], 0.0 if kind == "send" else seconds, fill)
        # As NCCL does: what the caller waits for at once runs on the caller's own stream. What is received is there
        # already, and must not queue behind what is sent.
        beside = kind != "recv" and (opts is None or opts.asyncOp)
        assert self._stream is not None
        stream = self._stream if beside else torch.cuda.current_stream()
        return self._clock.run(f"{STAND_IN}{kind} {self._description}", seconds, fill, held, stream)

    # --- Gathered: its own part in each place ---

    def _allgather_base(self, output: Tensor, given: Tensor, opts: Any = None) -> dist.Work:
        def fill() -> None:
            output.view(self.size(), -1).copy_(given.reshape(1, -1).expand(self.size(), -1))

        return self._run("all_gather", bytes_of(output), fill, (output, given), opts=opts)

    def all_gather_single_coalesced(self, outputs: list[Tensor], given: list[Tensor], opts: Any = None) -> dist.Work:
        """Several at once."""
        return last([self._allgather_base(*pair, opts) for pair in zip(outputs, given, strict=True)])

    def allgather(self, outputs: list[list[Tensor]], given: list[Tensor], opts: Any = None) -> dist.Work:
        """Into tensors of their own."""

        def fill() -> None:
            for output in outputs[0]:
                output.copy_(given[0])

        return self._run("all_gather", sum(map(bytes_of, outputs[0])), fill, (*outputs[0], *given), opts=opts)

    # --- Summed: its own ---

    def _reduce_scatter_base(self, output: Tensor, given: Tensor, opts: Any = None) -> dist.Work:
        def fill() -> None:
            output.view(-1).copy_(given.reshape(self.size(), -1)[self.rank()])

        return self._run("reduce_scatter", bytes_of(given), fill, (output, given), opts=opts)

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], given: list[Tensor], opts: Any = None
    ) -> dist.Work:
        """Several at once."""
        return last([self._reduce_scatter_base(*pair, opts) for pair in zip(outputs, given, strict=True)])

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        """In place."""
        size_bytes = sum(map(bytes_of, tensors))
        return self._run("all_reduce", size_bytes, lambda: None, (), opts=opts)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        """Several at once."""
        return self.allreduce(tensors, opts)

    # --- Exchanged: what it sends comes back to it ---

    def alltoall_base(
        self,
        output: Tensor,
        given: Tensor,
        taken: list[int],  # noqa: ARG002 (as many rows as the output has)
        sent: list[int],
        opts: Any = None,
    ) -> dist.Work:
        """Rows; taken, sent: how many from and to each rank, empty where all are equal."""
        # One rank alone is sent anything, and not this one: a turn of a ring.
        kind: Kind = "pass" if sum(map(bool, sent)) == 1 and not sent[self.rank()] else "all_to_all"
        return self._run(kind, bytes_of(given), partial(repeat_rows, output, given), (output, given), opts=opts)

    def send(self, tensors: list[Tensor], target: int, _tag: int = 0) -> dist.Work:
        """To a rank of the group."""
        return self._run("send", bytes_of(tensors[0]), lambda: None, tensors, between=self._pair(target))

    def recv(self, tensors: list[Tensor], source: int, _tag: int = 0) -> dist.Work:  # noqa: ARG002
        """From a rank of the group: there at once, with numbers of which no product is cheaper than of a state's."""
        return self._run("recv", 0.0, lambda: tensors[0].uniform_(-SPREAD, SPREAD), tensors, between=(0,))

    def _pair(self, other: int) -> tuple[int, ...]:
        return tuple(sorted((self._ranks[self.rank()], self._ranks[other])))

    # --- Small syncs outside of the steps ---

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:  # noqa: ARG002
        """Everybody has this rank's."""
        return Finished()

    def barrier(self, opts: Any = None) -> dist.Work:  # noqa: ARG002
        """Nobody else comes."""
        return Finished()

    # The same under the names that torch has for them from one version to the next.
    all_gather_single = _allgather_base
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_single = _reduce_scatter_base
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    all_to_all_single = alltoall_base


def bytes_of(tensor: Tensor) -> float:
    """What a tensor's elements take."""
    return float(tensor.numel() * tensor.element_size())


def last(works: list[dist.Work]) -> dist.Work:
    """Of transfers one after another on a stream, the one that the others end before."""
    return works[-1]


def repeat_rows(output: Tensor, given: Tensor) -> None:
    """Fill the output's rows with those given, over and over."""
    if not len(given):
        output.zero_()
        return
    for begin in range(0, len(output), len(given)):
        part = output[begin : begin + len(given)]
        part.copy_(given[: len(part)])
