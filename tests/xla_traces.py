"""Traces as JAX's profiler writes them: of its own, and made by hand. No JAX, no torch."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from meshwright.record.kineto import Trace, read_trace

Raw = dict[str, Any]
HOST, PYTHON = 701, 1


def xla_trace(events: Sequence[Mapping[str, Any]]) -> Trace:
    """Events read back from a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made by hand.json"
        path.write_text(json.dumps({"displayTimeUnit": "ns", "traceEvents": events}))
        return read_trace(path)


def read_xla(folder: Path) -> Trace:
    """The one trace that jax.profiler wrote into a folder."""
    (path,) = folder.glob("plugins/profile/*/*.trace.json.gz")
    return read_trace(path)


def named(kind: str, pid: int, name: str, tid: int | None = None) -> Raw:
    thread = {} if tid is None else {"tid": tid}
    return {"ph": "M", "name": kind, "pid": pid, **thread, "args": {"name": name}}


def event(name: str, pid: int, tid: int, start_ms: float, end_ms: float, **args: object) -> Raw:
    times = {"ts": start_ms * 1e3, "dur": (end_ms - start_ms) * 1e3}
    return {"ph": "X", "name": name, "pid": pid, "tid": tid, **times, "args": {key: str(v) for key, v in args.items()}}


NAMES = [named("process_name", HOST, "/host:CPU"), named("thread_name", HOST, "python", PYTHON)]


def host(name: str, start_ms: float, end_ms: float, **args: object) -> Raw:
    return event(name, HOST, PYTHON, start_ms, end_ms, **args)


def gpu_trace(*, marked: bool = True) -> Trace:
    """What `gpu_events` makes, read back."""
    return xla_trace(gpu_events(marked=marked))


def gpu_events(*, marked: bool = True) -> list[Raw]:
    """Two devices, three steps of 100 ms in which the device works 60 ms: streams, and the lines derived of them."""
    raw = list(NAMES)
    for device in (0, 1):
        pid = device + 1
        raw.append(named("process_name", pid, f"/device:GPU:{device}"))
        lines = {7: "Stream #7(Compute)", 8: "Stream #8(NCCL)", 90: "XLA Modules", 91: "XLA Ops", 92: "Steps"}
        raw += [named("thread_name", pid, line, tid) for tid, line in lines.items()]
    for step in range(3):
        at = 100.0 * step
        if marked:
            raw.append(host("train", at, at + 40, step_num=step))
        raw.append(host("input", at + 2, at + 20))
        raw.append(host("PjitFunction(train_step)", at + 25, at + 35))
        for device in (0, 1):
            pid, first = device + 1, 1000 * device + 10 * step
            ids = [first + number for number in range(4)]
            raw += [host("cuLaunchKernel", at + 30, at + 31, correlation_id=number) for number in ids]

            def op(name: str, stream: int, start: float, end: float, number: int, pid: int = pid) -> Raw:
                words = {"hlo_op": name, "hlo_module": "jit_train_step"}
                return event(f"{name}_kernel", pid, stream, start, end, correlation_id=number, **words)

            # Idle from 60 to 62 within the program; the gradients' sum runs alone from 80 to 90.
            raw += [
                op("gemm_fusion_dot.1", 7, at + 40, at + 60, ids[0]),
                op("loop_fusion.2", 7, at + 62, at + 80, ids[1]),
                op("all-reduce-start.1", 8, at + 70, at + 90, ids[2]),
                op("loop_fusion.3", 7, at + 90, at + 100, ids[3]),
                event("jit_train_step", pid, 90, at + 40, at + 100, run_id=step),
                event("gemm_fusion_dot.1", pid, 91, at + 40, at + 60, hlo_op="gemm_fusion_dot.1"),
            ]
    return raw


def tpu_events(begins: Sequence[float], *, with_input: bool = True) -> list[Raw]:
    """Steps of a TPU, whose lines know no launches: executions have a number, and instructions lie in them."""
    raw = [named("process_name", 3, "/device:TPU:0")]
    raw += [named("thread_name", 3, line, tid) for tid, line in {1: "Steps", 2: "XLA Modules", 3: "XLA Ops"}.items()]
    for step, at in enumerate(begins):
        raw.append(host("train", at, at + 10, step_num=step))
        if with_input:
            raw.append(host("next batch", at, at + 5))
        raw.append(host("TfrtTpuExecute", at + 8, at + 9, run_id=70 + step))
        # The device is behind: it begins when the host is in its next step.
        raw.append(event("jit_train_step(123)", 3, 2, at + 60, at + 78, run_id=70 + step))
        raw.append(event("while.1", 3, 3, at + 60, at + 78))
        raw.append(event("fusion.4", 3, 3, at + 61, at + 70, hlo_op="fusion.4"))
        raw.append(event("all-gather-start.2", 3, 3, at + 70, at + 71))
        raw.append(event("fusion.5", 3, 3, at + 71, at + 75))
        raw.append(event("all-gather-done.2", 3, 3, at + 75, at + 78))
    return raw
