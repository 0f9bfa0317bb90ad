"""Profiler traces made by hand, as different versions of PyTorch and as JAX write them. Times are milliseconds."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

WORLD = {
    "backend": "nccl",
    "rank": 3,
    "world_size": 4,
    "pg_count": 2,
    "pg_config": [
        {"pg_name": "0", "pg_desc": "default_pg", "backend_config": "cuda:nccl", "pg_size": 4, "ranks": []},
        {"pg_name": "17", "pg_desc": "mesh_shard", "backend_config": "cuda:nccl", "pg_size": 2, "ranks": [2, 3]},
    ],
}
# Microseconds since the profiler's epoch, where Kineto's traces begin.
BEGIN = 4569978095676.5


def complete(category: str, name: str, start: float, end: float, tid: object = 1, **args: Any) -> dict[str, Any]:
    """An event with a duration, as Kineto writes it since torch 2.1."""
    times = {"ts": BEGIN + start * 1e3, "dur": (end - start) * 1e3}
    return {"ph": "X", "cat": category, "name": name, "pid": 1344, "tid": tid, **times, "args": args}


def transfer(start: float, end: float, **args: Any) -> dict[str, Any]:
    """A collective's kernel."""
    told = {
        "Collective name": "_allgather_base",
        "In msg nelems": 4096,
        "dtype": "BFloat16",
        "Process Group Name": "17",
        "Process Group Description": "mesh_shard",
        "Process Group Ranks": "[2, 3]",
    }
    name = "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
    return complete("kernel", name, start, end, 22, stream=22, grid=[24, 1, 1], block=[544, 1, 1], **told, **args)


def steps(number: int) -> list[dict[str, Any]]:
    """All kinds of events that Kineto writes, in its order: the host's, then the device's."""
    host: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "ts": BEGIN, "pid": 1344, "tid": 0, "args": {"name": "python"}},
        {"ph": "M", "name": "thread_name", "ts": BEGIN, "pid": 1344, "tid": 1, "args": {"name": "thread 1"}},
    ]
    device: list[dict[str, Any]] = []
    for step in range(number):
        at, many = step * 10.0, step * 100
        host += [
            complete("user_annotation", f"ProfilerStep#{step}", at, at + 10, **{"External id": many}),
            complete("cpu_op", "aten::linear", at + 1, at + 3, **{"External id": many + 1, "Sequence number": step}),
            complete("cpu_op", "aten::mm", at + 1, at + 2, **{"External id": many + 2, "Input Dims": [[2, 3], [[]]]}),
            complete("python_function", 'a.py(3): f("{", [\\])', at + 1, at + 2),
            {"ph": "s", "id": many, "pid": 1344, "tid": 1, "ts": BEGIN + at * 1e3, "cat": "ac2g", "name": "ac2g"},
            complete("cuda_runtime", "cudaLaunchKernel", at + 1.5, at + 1.7, correlation=many + 2, cbid=211),
            {"ph": "i", "s": "g", "name": "[memory]", "pid": 1344, "tid": 1, "ts": BEGIN, "cat": "cpu_instant_event"},
        ]
        device += [
            complete("kernel", 'gemm<"}, {">', at + 2, at + 5, 7, stream=7, correlation=many + 2, grid=[9, 1, 1]),
            transfer(at + 5, at + 9, correlation=many + 3),
            complete("gpu_user_annotation", "nccl:all_gather", at + 5, at + 9, 22),
        ]
    return host + device


def kineto(events: list[dict[str, Any]], **beside: Any) -> dict[str, Any]:
    """A whole trace as torch 2.13 lays it out."""
    head = {
        "schemaVersion": 1,
        "deviceProperties": [{"id": 0, "name": "NVIDIA H200", "totalGlobalMem": 150109880320}],
        "distributedInfo": WORLD,
        "host_name": "node-7",
        "displayTimeUnit": "ms",
        "baseTimeNanoseconds": 1790857026000000000,
    }
    return head | beside | {"traceEvents": events, "traceName": "rank-3.json"}


def xla() -> dict[str, Any]:
    """As JAX's profiler writes one: names stand in metadata, values are strings, and the last event is empty."""
    named: list[tuple[int, int | None, str]] = [
        (701, None, "/host:CPU"),
        (701, 11, "python"),
        (701, 12, "python"),
        (2, None, "/device:GPU:0"),
        (2, 5, "Stream #5(Compute)"),
    ]
    told = {"hlo_op": "fusion.1", "hlo_module": "jit_step", "correlation_id": "91"}
    events: list[dict[str, Any]] = [
        {"ph": "X", "pid": 701, "tid": 11, "ts": 10.25, "dur": 900.5, "name": "train", "args": {"step_num": "4"}},
        {"ph": "X", "pid": 701, "tid": 11, "ts": 11.0, "dur": 2.0, "name": "$train.py:9 step"},
        {"ph": "X", "pid": 701, "tid": 12, "ts": 12.0, "dur": 2.0, "name": "PjitFunction(step)"},
        {"ph": "X", "pid": 2, "tid": 5, "ts": 20.0, "dur": 100.0, "name": "fusion.1", "args": told},
    ]
    for pid, tid, name in named:
        what = {"name": "process_name"} if tid is None else {"tid": tid, "name": "thread_name"}
        events.append({"ph": "M", "pid": pid, **what, "args": {"name": name}})
    return {"displayTimeUnit": "ns", "metadata": {"highres-ticks": True}, "traceEvents": [*events, {}]}


def old_kineto() -> str:
    """As torch 1.8 wrote one: other categories and keys, times of the epoch, no metadata, and a number JSON lacks."""
    return """{
  "schemaVersion": 1,
  "traceEvents": [
  {"ph": "X", "cat": "Operator", "name": "ProfilerStep#2", "pid": 9, "tid": "9",
   "ts": 1614800519473000, "dur": 900, "args": {"External id": 1, "Trace name": "PyTorch Profiler"}},
  {"ph": "X", "cat": "Operator", "name": "aten::to", "pid": 9, "tid": "9",
   "ts": 1614800519473100, "dur": 200, "args": {"External id": 3981, "Trace iteration": 0}},
  {"ph": "X", "cat": "Runtime", "name": "cudaMemcpyAsync", "pid": 9, "tid": "9",
   "ts": 1614800519473110, "dur": 20, "args": {"cbid": 41, "correlation": 20002, "external id": 3981}},
  {"ph": "X", "cat": "Memcpy", "name": "Memcpy HtoD (Pageable -> Device)", "pid": 0, "tid": "stream 7",
   "ts": 1614800519473220, "dur": 0,
   "args": {"device": 0, "stream": 7, "correlation": 20002, "external id": 3981, "memory bandwidth (GB/s)": inf}},
  {"ph": "X", "cat": "Kernel", "name": "ncclKernel_AllReduce", "pid": 0, "tid": "stream 9",
   "ts": 1614800519473230, "dur": 40, "args": {"stream": 9, "correlation": 20003, "external id": 3982}}
]}"""


def write(folder: Path, trace: object, name: str = "rank-3.json") -> Path:
    """A trace, or any text or bytes, as a file; packed if its name says so."""
    path = folder / name
    text = trace if isinstance(trace, str | bytes) else json.dumps(trace)
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)
    return path


def damaged(rng: random.Random, data: bytes) -> bytes:
    """With some bytes changed, left out or repeated, or an end that is missing."""
    for _ in range(rng.randint(1, 4)):
        at, other = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
        match rng.randrange(4):
            case 0:
                data = data[:at] + bytes([rng.choice(b'"{}[],:\\\x00e9\xff')]) + data[at + 1 :]
            case 1:
                data = data[:at]
            case 2:
                data = data[: min(at, other)] + data[max(at, other) :]
            case _:
                data = data[:at] + data[min(at, other) : min(at, other) + 50] + data[at:]
    return data
