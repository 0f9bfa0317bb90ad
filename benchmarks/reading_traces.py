"""Speed and memory of reading a large profiler trace.

    python benchmarks/reading_traces.py [--gigabytes 2] [--gzip] [--folder FOLDER]

Writes a trace as Kineto writes that of a GPU rank: 10,000 operators a step in three levels, their launches, kernels and
arrows between them, first all host events and then the device's; its numbers of events of each kind are about those of
a sharded decoder of 1 billion parameters on an H200 (torch 2.11). Then, in a process of its own, reads it and takes the
events of every step once. Prints the seconds of both and the most memory that the process held.
"""

import argparse
import gzip
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from meshwright.record.kineto.reading import read_trace

HEADER = """{
  "schemaVersion": 1,
  "deviceProperties": [{"id": 0, "name": "NVIDIA H200", "totalGlobalMem": 150109880320}],
  "distributedInfo": {"backend": "nccl", "rank": 0, "world_size": 2, "pg_count": 1,
    "pg_config": [{"pg_name": "0", "pg_desc": "default_pg", "pg_size": 2, "ranks": [0, 1]}]},
  "displayTimeUnit": "ms",
  "baseTimeNanoseconds": 1790857026000000000,
  "traceEvents": [
"""
# Microseconds: of a step, and the time at which the first begins.
STEP_US, BEGIN_US = 300_000.0, 4569978095676.601
OPERATORS = ("aten::linear", "aten::mul", "aten::_to_copy", "aten::scaled_dot_product_attention", "aten::silu")
INSIDE = ("aten::matmul", "aten::mul", "aten::empty_strided", "aten::_flash_attention_forward", "aten::silu")
KERNELS = (
    "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_TNT",
    (
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>, "
        "std::array<char*, 3ul> >(int, at::native::CUDAFunctor_add<c10::BFloat16>, std::array<char*, 3ul>)"
    ),
    (
        "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::"
        "{lambda()#3}::operator()() const::{lambda()#12}::operator()() const::{lambda(c10::BFloat16)#1}, "
        "std::array<char*, 2ul>, 4, TrivialOffsetCalculator<1, unsigned int>, char*, "
        "at::native::memory::LoadWithCast<1>, at::native::memory::StoreWithCast<1> >(int, "
        "at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&))"
    ),
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, false, false, cutlass::bfloat16_t>>",
    "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
)
# Operators a step; each has another inside, which has two more; every second launches a kernel.
PER_STEP = 2_500
STEP_BYTES = 6_150_000


def event(category: str, name: str, process: int, thread: int, start: float, duration: float, args: str) -> str:
    """A complete event in Kineto's layout."""
    return (
        f'  {{\n    "ph": "X", "cat": "{category}", "name": "{name}", "pid": {process}, "tid": {thread},\n'
        f'    "ts": {start:.3f}, "dur": {duration:.3f},\n    "args": {{\n      {args}\n    }}\n  }},\n'
    )


def arrow(phase: str, number: int, process: int, thread: int, at: float) -> str:
    """One end of an arrow from a launch to its kernel."""
    return (
        f'  {{\n    "ph": "{phase}", "id": {number}, "pid": {process}, "tid": {thread}, "ts": {at:.3f},\n'
        f'    "cat": "ac2g", "name": "ac2g"\n  }},\n'
    )


def host_events(step: int) -> Iterator[str]:
    """A step's annotation, operators and launches."""
    begin = BEGIN_US + step * STEP_US
    yield event("user_annotation", f"ProfilerStep#{step}", 1344, 1344, begin, STEP_US - 5, f'"External id": {step}')
    for number in range(PER_STEP):
        start = begin + 10 + number * (STEP_US - 20) / PER_STEP
        kind, thread = number % len(OPERATORS), 1344 + (number % 3 == 2) * 38
        outer = (step * PER_STEP + number) * 4 + 1
        for level, name in enumerate((OPERATORS[kind], INSIDE[kind], "aten::empty", "aten::view")):
            args = f'"External id": {outer + level},"Record function id": 0, "Ev Idx": {outer + level}'
            if level == 0:
                args = f'"Sequence number": {outer}, "Fwd thread id": 0, {args}'
            at, lasts = start + level * 3.217, 40.0 - 9.875 * level
            yield event("cpu_op", name, 1344, thread, at, lasts, args)
        for launch in range(2):
            args = f'"External id": {outer + 1}, "cbid": 211, "correlation": {outer + launch}'
            yield event("cuda_runtime", "cudaLaunchKernel", 1344, thread, start + 15 + launch * 8, 5.104, args)
        for launch in range(2):
            yield arrow("s", outer + launch, 1344, thread, start + 15 + launch * 8)


def device_events(step: int) -> Iterator[str]:
    """A step's kernels."""
    begin = BEGIN_US + step * STEP_US
    for number in range(PER_STEP):
        start = begin + 25 + number * (STEP_US - 20) / PER_STEP
        outer, kind = (step * PER_STEP + number) * 4 + 1, number % len(KERNELS)
        args = (
            f'"External id": {outer + 1},\n      "queued": 0, "device": 0, "context": 1,\n      "stream": 7, '
            f'"correlation": {outer},\n      "registers per thread": 96,\n      "shared memory": 103808,\n      '
            f'"blocks per SM": 0.007576,\n      "warps per SM": 0.030303,\n      "grid": [{64 << kind}, 1, 1],\n      '
            f'"block": [128, 1, 1],\n      "est. achieved occupancy %": 0'
        )
        if "nccl" in KERNELS[kind]:
            args += (
                ',\n      "Collective name": "_allgather_base", "In msg nelems": 262669312, "Group size": 2, '
                '"dtype": "BFloat16", "Process Group Name": "0", "Process Group Description": "default_pg", '
                '"Process Group Ranks": "[0, 1]"'
            )
        yield event("kernel", KERNELS[kind], 0, 7 if kind < 4 else 22, start, 80.416, args)
        yield arrow("f", outer, 0, 7, start)


def write_trace(file: IO[str], steps: int) -> None:
    """A trace of so many steps."""
    file.write(HEADER)
    for events in (host_events, device_events):
        for step in range(steps):
            file.write("".join(events(step)))
    file.write('  {\n    "ph": "i", "s": "g", "name": "Record Window End", "pid": "", "tid": "", "ts": 0\n  }\n  ],\n')
    file.write('  "traceName": "rank-0.json"\n}\n')


def measure(path: Path) -> None:
    """Read a trace and take the events of all its steps."""
    begin = time.perf_counter()
    trace = read_trace(path)
    read = time.perf_counter()
    steps = [mark for mark in trace.marks() if mark.name.startswith("ProfilerStep#")]
    taken = sum(len(trace.within(step.start_s, step.end_s)) for step in steps)
    end = time.perf_counter()
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{len(trace):,} events kept, {sum(trace.dropped.values()):,} left out, {len(steps)} steps")
    print(f"read in {read - begin:.1f} s; {taken:,} events of all steps taken in {end - read:.1f} s")
    print(f"most memory held: {held / 1e9:.2f} GB")


def main() -> None:
    """As the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the trace, before packing")
    parser.add_argument("--gzip", action="store_true", help="pack it")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    parser.add_argument("--read", type=Path, help="read this trace instead of writing one")
    options = parser.parse_args()
    if options.read:
        measure(options.read)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "rank-0.json"
        with path.open("w") as file:
            write_trace(file, max(1, round(options.gigabytes * 1e9 / STEP_BYTES)))
        print(f"a trace of {path.stat().st_size / 1e9:.2f} GB", end="", flush=True)
        if options.gzip:
            packed = path.with_suffix(".json.gz")
            with path.open("rb") as source, gzip.open(packed, "wb", compresslevel=1) as target:
                shutil.copyfileobj(source, target, 1 << 20)
            path.unlink()
            path = packed
            print(f", packed {path.stat().st_size / 1e9:.2f} GB", end="")
        print(flush=True)
        subprocess.run([sys.executable, __file__, "--read", str(path)], check=True)


if __name__ == "__main__":
    main()
