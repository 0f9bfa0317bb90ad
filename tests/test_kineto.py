"""A GPU's account from profiler traces made by hand, with every moment known. Times are milliseconds; no GPU needed."""

import random
from typing import Any

import pytest

from meshwright.account import MeasuredStep, StepAccount, split_waits
from meshwright.record.kineto import PREFIX, STEP, measure_step, message_label
from meshwright.spec import Layout
from meshwright.trace.recorder import group_purposes

HOST, COMPUTE = 1, 7
WORLD = {"0": ("default_pg", [0, 1]), "17": ("mesh_shard", [0, 1]), "18": ("mesh_replica", [0, 2])}


class Trace:
    """A trace as Kineto writes it: two steps, of which the first leaves the device busy until 12 ms.

    The step that is measured is annotated from 10 ms until the host has launched the last of it.
    """

    def __init__(self, busy_until: float = 12.0) -> None:
        self.events: list[dict[str, Any]] = []
        self.annotate(STEP, 0, 10)
        self.annotate(STEP, 10, 10)
        self._step = self.events[-1]
        self.kernel("warm", 1, busy_until, launch=0.5)

    def annotate(self, name: str, start: float, end: float) -> None:
        self._add("user_annotation", name, start, end, tid=HOST)

    def phase(self, name: str, start: float, end: float) -> None:
        self.annotate(PREFIX + name, start, end)

    def kernel(self, name: str, start: float, end: float, *, launch: float | None, **args: Any) -> None:
        """A kernel, with the call that launched it, which returns at `launch`."""
        correlation = len(self.events)
        if launch is not None:
            self._add("cuda_runtime", "cudaLaunchKernel", launch - 0.002, launch, tid=HOST, correlation=correlation)
        self._add("kernel", name, start, end, tid=COMPUTE, correlation=correlation, **args)

    def operator(self, name: str, start: float, end: float) -> None:
        """An operator on the host."""
        self._add("cpu_op", name, start, end, tid=HOST)

    def transfer(self, start: float, end: float, *, launch: float, group: str = "17") -> None:
        name = "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
        args = {"Process Group Name": group, "Process Group Description": WORLD[group][0]}
        self.kernel(name, start, end, launch=launch, **args)

    def _add(self, category: str, name: str, start: float, end: float, *, tid: int, **args: Any) -> None:
        span = {"ts": start * 1e3, "dur": (end - start) * 1e3}
        if tid == HOST and start > 10:
            self._step["dur"] = max(self._step["dur"], end * 1e3 - self._step["ts"])
        self.events.append({"ph": "X", "cat": category, "name": name, "pid": 0, "tid": tid, **span, "args": args})

    def measured(self, *, layout: Layout | None = None, rank: int = 0, useful: float = 0.0) -> MeasuredStep:
        config = [{"pg_name": name, "pg_desc": what, "ranks": ranks} for name, (what, ranks) in WORLD.items()]
        # Kineto writes events of other kinds too, and in no order.
        noise = [
            {"ph": "M", "name": "process_name", "args": {}},
            {"ph": "s", "cat": "ac2g", "name": "ac2g", "ts": 11e3},
        ]
        events = [*noise, *reversed(self.events)]
        return measure_step(
            {"traceEvents": events, "distributedInfo": {"pg_config": config}},
            step=3,
            rank=rank,
            host="a",
            purposes=group_purposes(layout or Layout(replica=2, shard=2)),
            useful_s=useful * 1e-3,
        )


def ms(account: StepAccount) -> dict[str, float]:
    """The buckets that are not empty, milliseconds."""
    return {name: round(seconds * 1e3, 6) for name, seconds in account.rows() if abs(seconds) > 1e-12}


def test_kernels_end_to_end() -> None:
    trace = Trace()
    trace.kernel("one", 12, 16, launch=10.5)
    trace.kernel("two", 16, 20, launch=11)
    step = trace.measured(useful=3)
    assert (step.start_s, step.end_s) == (pytest.approx(12e-3), pytest.approx(20e-3))
    assert ms(step.account) == {"useful": 3, "inefficiency": 5}


def test_kernels_that_beat_the_datasheet_show_as_negative_inefficiency() -> None:
    trace = Trace()
    trace.kernel("one", 12, 16, launch=10.5)
    assert ms(trace.measured(useful=9).account) == {"useful": 9, "inefficiency": -5}


def test_idle_until_a_late_launch_is_host() -> None:
    trace = Trace()
    trace.kernel("one", 12, 16, launch=10.5)
    trace.kernel("two", 18.005, 20, launch=18)
    # The microseconds in which the launch travels belong to it.
    assert ms(trace.measured().account) == {"inefficiency": 5.995, "host": 2.005}


def test_idle_after_a_timely_launch_is_not_host() -> None:
    trace = Trace()
    trace.kernel("one", 12, 16, launch=10.5)
    trace.kernel("two", 18, 20, launch=17)
    assert ms(trace.measured().account) == {"inefficiency": 6, "host": 1, "other": 1}


@pytest.mark.parametrize("name", ["input", "checkpoint"])
def test_a_launch_late_because_of_something_else(name: str) -> None:
    trace = Trace()
    trace.kernel("one", 12, 16, launch=10.5)
    trace.phase(name, 15, 17.5)
    trace.kernel("two", 18.005, 20, launch=18)
    assert ms(trace.measured().account) == {"inefficiency": 5.995, name: 1.5, "host": 0.505}


def test_an_exposed_transfer_and_an_overlapped_one() -> None:
    trace = Trace()
    trace.kernel("one", 12, 16, launch=10.5)
    trace.transfer(14, 18, launch=10.6)
    trace.kernel("two", 18, 20, launch=10.7)
    step = trace.measured()
    assert ms(step.account) == {"inefficiency": 6, "comm.shard": 2}
    assert step.overlapped == {"shard": pytest.approx(2e-3)}
    (transfer,) = step.transfers
    assert (transfer.purpose, transfer.ranks, transfer.index) == ("shard", (0, 1), 0)
    assert transfer.exposed == ((pytest.approx(16e-3), pytest.approx(18e-3)),)


def test_an_instant_belongs_to_one_transfer() -> None:
    trace = Trace()
    trace.kernel("one", 12, 13, launch=10.5)
    trace.transfer(13, 16, launch=10.6, group="17")
    trace.transfer(14, 18, launch=10.7, group="18")
    trace.kernel("two", 18, 20, launch=10.8)
    # The one that ends last is what the next kernel waited for.
    assert ms(trace.measured().account) == {"inefficiency": 3, "comm.shard": 1, "comm.replica": 4}


def test_transfers_are_numbered_within_their_group() -> None:
    trace = Trace()
    for start, group in ((12, "17"), (13, "18"), (14, "17"), (15, "17")):
        trace.transfer(start, start + 1, launch=10.5, group=group)
    trace.kernel("one", 16, 17, launch=10.8)
    keys = [transfer.key for transfer in trace.measured().transfers]
    assert keys == [("shard", (0, 1), 0), ("replica", (0, 2), 0), ("shard", (0, 1), 1), ("shard", (0, 1), 2)]


@pytest.mark.parametrize(
    ("layout", "purpose"),
    [(Layout(shard=2), "shard"), (Layout(replica=2), "replica"), (Layout(replica=2, shard=2), "control")],
    ids=["shard", "replica", "both"],
)
def test_the_group_of_all_ranks_carries_the_axis_that_spans_them(layout: Layout, purpose: str) -> None:
    trace = Trace()
    trace.kernel("one", 12, 16, launch=10.5)
    trace.transfer(16, 18, launch=10.6, group="0")
    trace.kernel("two", 18, 20, launch=10.7)
    assert ms(trace.measured(layout=layout).account) == {"inefficiency": 6, f"comm.{purpose}": 2}


def test_small_syncs_are_told_by_the_phase_that_launches_them() -> None:
    trace = Trace()
    trace.phase("control", 11, 11.5)
    trace.kernel("one", 12, 16, launch=10.5)
    trace.transfer(16, 17, launch=10.9, group="0")
    trace.transfer(17, 18, launch=11.2, group="0")
    trace.kernel("two", 18, 20, launch=11.7)
    step = trace.measured(layout=Layout(shard=2))
    assert ms(step.account) == {"inefficiency": 6, "comm.shard": 1, "comm.control": 1}
    assert [transfer.purpose for transfer in step.transfers] == ["shard", "control"]


@pytest.mark.parametrize("layout", [Layout(context=2), Layout(shard=2, context=2)], ids=["context", "shard-context"])
def test_attention_says_which_transfers_are_its_own(layout: Layout) -> None:
    """In the group of all ranks too, which shards parameters besides."""
    trace = Trace()
    trace.phase("context", 11, 11.5)
    trace.kernel("one", 12, 16, launch=10.5)
    trace.transfer(16, 17, launch=10.9, group="0")
    trace.transfer(17, 18, launch=11.2, group="0")
    trace.kernel("two", 18, 20, launch=11.7)
    step = trace.measured(layout=layout)
    assert ms(step.account) == {"inefficiency": 6, "comm.shard": 1, "comm.context": 1}
    assert [transfer.purpose for transfer in step.transfers] == ["shard", "context"]


def test_the_optimizer_is_what_its_phase_launched() -> None:
    trace = Trace()
    trace.phase("optimizer", 11, 12)
    trace.kernel("backward", 12, 15, launch=10.5)
    trace.kernel("adamw", 15, 19, launch=11.5)
    # Under it a transfer is hidden as under any other kernel.
    trace.transfer(16, 18, launch=11.6)
    step = trace.measured()
    assert ms(step.account) == {"inefficiency": 3, "optimizer": 4}
    assert step.overlapped == {"shard": pytest.approx(2e-3)}


def test_a_host_behind_the_device_ends_the_step() -> None:
    """Where it updates parameters itself, that is the optimizer's time; what else it does meanwhile is its own."""
    trace = Trace()
    trace.kernel("backward", 12, 15, launch=10.5)
    trace.phase("optimizer", 13, 19.5)
    # Beside the device's work, then alone; the last of them launches a copy, which is waited for inside.
    trace.operator("aten::linalg_vector_norm", 14, 16)
    trace.operator("aten::_fused_adamw_", 16.5, 19)
    trace.operator("aten::empty", 17, 17.5)
    trace.operator("aten::copy_", 19, 19.4)
    trace.operator("aten::empty_strided", 19.05, 19.1)
    trace.kernel("Memcpy DtoH (Device -> Pinned)", 19.3, 19.35, launch=19.2)
    trace.phase("checkpoint", 20, 20.5)
    trace.annotate("reading", 20.5, 21)
    step = trace.measured()
    assert (step.start_s, step.end_s) == (pytest.approx(12e-3), pytest.approx(21e-3))
    assert ms(step.account) == {
        "inefficiency": 3,
        "optimizer": 1 + 2.5 + 0.05,
        "checkpoint": 0.5,
        "host": 0.5 + 0.2 + 0.65 + 0.5,
        "other": 0.1,
    }


def test_steps_follow_one_another_without_a_gap() -> None:
    """Whether the host is ahead of the device or behind it: the end of one is the start of the next."""
    for ended, wanted in ((11.0, 16.0), (18.0, 18.0)):
        trace = Trace()
        trace.kernel("one", 12, 16, launch=10.5)
        trace.annotate("python", 10.9, ended)
        first = trace.measured()
        trace.annotate(STEP, ended, ended + 1)
        trace.kernel("two", 20, 22, launch=ended + 0.5)
        assert first.end_s == pytest.approx(wanted * 1e-3) == trace.measured().start_s


def test_recompute_is_what_its_phase_launched_but_for_transfers() -> None:
    trace = Trace()
    trace.phase("backward", 10.2, 12)
    trace.phase("recompute", 11, 11.5)
    trace.kernel("forward", 12, 13, launch=10.1)
    trace.kernel("forward", 13, 15, launch=11.2)
    # In a tensor layout the second run gathers and reduces again.
    trace.transfer(15, 16, launch=11.3)
    trace.kernel("forward", 16, 17, launch=11.4)
    trace.kernel("backward", 17, 20, launch=11.7)
    # The kernels that ran before have no say in how fast these run beside a transfer.
    assert ms(trace.measured().account) == {"inefficiency": 4, "recompute": 3, "comm.shard": 1}


def test_contention_is_what_the_same_kernel_takes_longer() -> None:
    trace = Trace()
    for number in range(3):
        trace.kernel("gemm", 12 + 2 * number, 14 + 2 * number, launch=10.5, grid=[1, 1, 1], block=[128, 1, 1])
    trace.kernel("gemm", 18, 21, launch=10.6, grid=[1, 1, 1], block=[128, 1, 1])
    # Of another shape, so there is nothing to hold it against.
    trace.kernel("gemm", 21, 26, launch=10.7, grid=[2, 1, 1], block=[128, 1, 1])
    trace.transfer(18.5, 25, launch=10.8)
    assert ms(trace.measured(useful=2).account) == {"useful": 2, "contention": 1, "inefficiency": 11}


def test_a_kernel_of_the_step_before_does_not_count() -> None:
    trace = Trace(busy_until=14)
    trace.kernel("one", 14, 16, launch=10.5)
    # On another stream, launched within the step, before the device came to it.
    trace.kernel("side", 13, 15, launch=10.4)
    step = trace.measured()
    assert step.wall_s == pytest.approx(2e-3)
    assert ms(step.account) == {"inefficiency": 2}


def test_a_kernel_whose_launch_was_not_recorded_counts_by_its_own_time() -> None:
    trace = Trace()
    trace.kernel("one", 12, 16, launch=10.5)
    trace.kernel("graphed", 16, 18, launch=None)
    trace.annotate("python", 11, 17)
    assert ms(trace.measured().account) == {"inefficiency": 6}


def test_memory_copies_are_work() -> None:
    trace = Trace()
    trace.kernel("one", 12, 16, launch=10.5)
    trace.kernel("Memcpy HtoD (Pinned -> Device)", 16, 17, launch=10.6)
    trace.events[-1]["cat"] = "gpu_memcpy"
    assert ms(trace.measured().account) == {"inefficiency": 5}


@pytest.mark.parametrize(
    ("lacks", "says"),
    [
        ("steps", "no annotated step"),
        ("lead", "holds only one"),
        ("kernels", "no kernels of the annotated step"),
        ("time", "no kernels of the annotated step"),
    ],
)
def test_a_trace_that_lacks_something_is_refused(lacks: str, says: str) -> None:
    # Where the step before ends last, there is no time that is this step's alone.
    trace = Trace(busy_until=17 if lacks == "time" else 12)
    if lacks != "kernels":
        trace.kernel("one", 12, 16, launch=10.5)
        steps = [event for event in trace.events if event["name"] == STEP]
        for event in {"steps": steps, "lead": steps[:1], "time": []}[lacks]:
            trace.events.remove(event)
    with pytest.raises(ValueError, match=says):
        trace.measured()


def test_waiting_for_a_slow_peer_is_no_transfer() -> None:
    def rank(number: int, slower: float) -> MeasuredStep:
        trace = Trace()
        trace.kernel("one", 12, 16 + slower, launch=10.5)
        # A collective ends for all at the same time, and begins when each comes to it.
        trace.transfer(16 + slower, 20, launch=10.6)
        trace.kernel("two", 20, 22, launch=10.7)
        return trace.measured(rank=number)

    waited, slow = split_waits([rank(0, 0.0), rank(1, 3.0)])
    assert ms(waited.account) == {"inefficiency": 6, "comm.shard": 1, "straggler": 3}
    assert waited.blame == {1: pytest.approx(3e-3)}
    assert ms(slow.account) == {"inefficiency": 9, "comm.shard": 1}
    assert slow.blame == {}


def test_a_receive_that_waits_beside_kernels_is_no_transfer() -> None:
    def rank(number: int, what: str, begin: float) -> MeasuredStep:
        trace = Trace()
        trace.kernel("passes", 12, 22, launch=10.5)
        # Posted early by the one that receives, it ends for both at the same time.
        trace.annotate(message_label(what, 0, 1, 0), 10.55, 10.65)
        trace.transfer(begin, 20, launch=10.6)
        return trace.measured(rank=number)

    ranks = [rank(0, "send", 19), rank(1, "receive", 13)]
    assert ranks[1].overlapped == {"pipeline": pytest.approx(7e-3)}
    assert [one.overlapped for one in split_waits(ranks)] == [{"pipeline": pytest.approx(1e-3)}] * 2
    # Whoever does not know the sender's step takes it as it is.
    assert split_waits(ranks[1:])[0].overlapped == {"pipeline": pytest.approx(7e-3)}


def random_trace(chance: random.Random) -> Trace:
    """Kernels and transfers at random on two streams, launched early or late, in random phases."""
    trace = Trace(busy_until=chance.uniform(9, 14))
    for name in ("input", "recompute", "context", "optimizer", "control", "checkpoint"):
        start = chance.uniform(10, 29)
        trace.phase(name, start, chance.uniform(start, 30))
    now = [chance.uniform(10, 14), chance.uniform(10, 14)]
    for _ in range(chance.randrange(1, 30)):
        stream = chance.randrange(2)
        start = now[stream] + chance.choice((0.0, 0.0, chance.uniform(0, 2)))
        end = now[stream] = start + chance.uniform(0.001, 2)
        launch = max(10.0, start - chance.choice((0.001, 0.005, 0.5, 5.0))) if start < 30 else 29.0
        if stream:
            trace.transfer(start, end, launch=launch, group=chance.choice(list(WORLD)))
        else:
            shape = [chance.randrange(1, 3), 1, 1]
            trace.kernel(chance.choice(("gemm", "add")), start, end, launch=launch, grid=shape, block=shape)
    for _ in range(chance.randrange(4)):
        start = chance.uniform(10, 29)
        trace.operator("aten::mul", start, start + chance.uniform(0, 2))
    trace.kernel("last", max(14, *now), max(14, *now) + 1, launch=10.1)
    return trace


def test_no_instant_is_lost_or_counted_twice() -> None:
    chance = random.Random(20261122)
    for _ in range(500):
        step = random_trace(chance).measured(useful=chance.uniform(0, 20))
        account = step.account
        assert account.total() == pytest.approx(step.wall_s, rel=1e-9)
        # More than a datasheet's peak, and contention beyond the time that kernels filled, are booked against it.
        for name, seconds in account.rows():
            assert seconds >= -1e-12 or name == "inefficiency", (name, seconds)
        exposed = sum(transfer.exposed_s() for transfer in step.transfers)
        comm = sum(seconds for name, seconds in account.rows() if name.startswith("comm."))
        assert exposed == pytest.approx(comm, abs=1e-12)
        assert all(t.exposed_s() <= t.end_s - t.start_s + 1e-12 for t in step.transfers)
