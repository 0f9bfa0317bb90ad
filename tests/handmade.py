"""GPU traces made by hand, with every moment known. Times are milliseconds; no GPU needed."""

import json
import tempfile
from pathlib import Path
from typing import Any

from meshwright.account import MeasuredStep, Purpose, StepAccount
from meshwright.record import Step
from meshwright.record.kineto import PREFIX, STEP, Trace, measure_step, measure_trace, read_trace
from meshwright.spec import Layout
from meshwright.trace.recorder import group_purposes

HOST, AUTOGRAD, COMPUTE = 1, 2, 7
NODE = "autograd::engine::evaluate_function: "
WORLD = {"0": ("default_pg", [0, 1]), "17": ("mesh_shard", [0, 1]), "18": ("mesh_replica", [0, 2])}


class HandMade:
    """A trace as Kineto writes it: two steps, of which the first leaves the device busy until 12 ms.

    The step that is measured is annotated from 10 ms until the host has launched the last of it.
    """

    def __init__(self, busy_until: float = 12.0, *, steps: tuple[str, str] = (STEP, STEP)) -> None:
        self.events: list[dict[str, Any]] = []
        self.annotate(steps[0], 0, 10)
        self.annotate(steps[1], 10, 10)
        self._step = self.events[-1]
        self.kernel("warm", 1, busy_until, launch=0.5)

    def annotate(self, name: str, start: float, end: float) -> None:
        self._add("user_annotation", name, start, end, tid=HOST)

    def phase(self, name: str, start: float, end: float) -> None:
        self.annotate(PREFIX + name, start, end)

    def kernel(
        self, name: str, start: float, end: float, *, launch: float | None, thread: int = HOST, **args: Any
    ) -> None:
        """A kernel, with the call that launched it, which returns at `launch`."""
        correlation = len(self.events)
        if launch is not None:
            self.call("cudaLaunchKernel", launch - 0.002, launch, thread=thread, correlation=correlation)
        self._add("kernel", name, start, end, tid=COMPUTE, correlation=correlation, **args)

    def call(self, name: str, start: float, end: float, *, thread: int = HOST, **args: Any) -> None:
        """A call of the device's runtime."""
        self._add("cuda_runtime", name, start, end, tid=thread, **args)

    def operator(self, name: str, start: float, end: float, *, thread: int = HOST, **args: Any) -> None:
        """An operator on the host."""
        self._add("cpu_op", name, start, end, tid=thread, **args)

    def node(self, name: str, start: float, end: float, *, thread: int = AUTOGRAD) -> None:
        """A node of the backward pass: autograd's bracket, and the function in it."""
        self.operator(NODE + name, start, end, thread=thread, **{"Sequence number": 1})
        self.operator(name, start, end, thread=thread, **{"Sequence number": 1})

    def transfer(
        self,
        start: float,
        end: float,
        *,
        launch: float,
        group: str = "17",
        kind: str = "AllGather",
        description: str | None = None,
        thread: int = HOST,
        **args: Any,
    ) -> None:
        """A collective's kernel; description: of its group, where it is not the one that WORLD has."""
        name = f"ncclDevKernel_{kind}_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
        told = {"Process Group Name": group, "Process Group Description": description or WORLD[group][0]}
        self.kernel(name, start, end, launch=launch, thread=thread, **told, **args)

    def _add(self, category: str, name: str, start: float, end: float, *, tid: int, **args: Any) -> None:
        span = {"ts": start * 1e3, "dur": (end - start) * 1e3}
        if tid in (HOST, AUTOGRAD) and start > 10:
            self._step["dur"] = max(self._step["dur"], end * 1e3 - self._step["ts"])
        self.events.append({"ph": "X", "cat": category, "name": name, "pid": 0, "tid": tid, **span, "args": args})

    def trace(self) -> Trace:
        """As it is read from the file that the profiler writes."""
        config = [{"pg_name": name, "pg_desc": what, "ranks": ranks} for name, (what, ranks) in WORLD.items()]
        # Kineto writes events of other kinds too, and in no order.
        noise = [
            {"ph": "M", "name": "process_name", "args": {}},
            {"ph": "s", "cat": "ac2g", "name": "ac2g", "ts": 11e3},
        ]
        # Times are counted from the first event.
        origin = {"ph": "X", "cat": "cpu_op", "name": "origin", "pid": 0, "tid": 99, "ts": 0.0, "dur": 0.0, "args": {}}
        events = [*noise, origin, *reversed(self.events)]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rank-0.json"
            path.write_text(json.dumps({"traceEvents": events, "distributedInfo": {"pg_config": config}}))
            return read_trace(path)

    def measured(self, *, layout: Layout | None = None, rank: int = 0, useful: float = 0.0) -> MeasuredStep:
        """The last step, as our own trainer has it measured."""
        told = measure_step(
            self.trace(),
            step=3,
            rank=rank,
            host="a",
            purposes=group_purposes(layout or Layout(replica=2, shard=2)),
            useful_s=useful * 1e-3,
        )
        return told.measured

    def foreign(self, purposes: dict[str, Purpose] | None = None) -> Step:
        """The last step, as that of a program that nothing is known of."""
        steps, _ = measure_trace(self.trace(), purposes=purposes)
        return steps[-1]


def ms(account: StepAccount) -> dict[str, float]:
    """The buckets that are not empty, milliseconds."""
    return {name: round(seconds * 1e3, 6) for name, seconds in account.rows() if abs(seconds) > 1e-12}
