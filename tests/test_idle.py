"""Why a device had nothing to do, by what the host was at before it launched late."""

import json
from pathlib import Path
from typing import Any

import pytest

from meshwright.record.kineto import measure_trace, read_trace

COPY = "Memcpy DtoH (Device -> {})"


def trace(path: Path, call: str, copy: str) -> Path:
    """Two steps of 10 ms: a kernel, a call of 4.8 ms, and 0.9 ms later the launch of another."""
    events: list[dict[str, Any]] = []

    def add(category: str, name: str, start_ms: float, end_ms: float, **args: int) -> None:
        span = {"ts": start_ms * 1e3, "dur": (end_ms - start_ms) * 1e3}
        row = 7 if category in ("kernel", "gpu_memcpy") else 1
        events.append({"ph": "X", "cat": category, "name": name, "pid": 0, "tid": row, **span, "args": args})

    for step in range(2):
        at, first, second, third = 10.0 * step, 3 * step + 1, 3 * step + 2, 3 * step + 3
        add("user_annotation", f"ProfilerStep#{step}", at, at + 10)
        add("cuda_runtime", "cudaLaunchKernel", at + 0.1, at + 0.2, correlation=first)
        add("kernel", "one", at + 0.2, at + 5.0, correlation=first)
        add("cuda_runtime", call, at + 0.3, at + 5.1, correlation=second)
        if copy:
            add("gpu_memcpy", copy, at + 5.0, at + 5.05, correlation=second)
        add("cuda_runtime", "cudaLaunchKernel", at + 6.0, at + 6.1, correlation=third)
        add("kernel", "two", at + 6.1, at + 9.9, correlation=third)
    path.write_text(json.dumps({"schemaVersion": 1, "traceEvents": events}))
    return path


@pytest.mark.parametrize(
    ("call", "copy", "waits"),
    [
        ("cudaStreamSynchronize", "", True),
        ("cudaFree", "", True),
        ("cudaMemcpyAsync", COPY.format("Pageable"), True),
        # Into pinned memory the call only launches: if it takes long, that is launching.
        ("cudaMemcpyAsync", COPY.format("Pinned"), False),
        ("cudaMemsetAsync", "", False),
    ],
)
def test_calls_that_return_when_the_device_is_done_make_the_host_late(
    tmp_path: Path, call: str, copy: str, waits: bool
) -> None:
    steps, _ = measure_trace(read_trace(trace(tmp_path / "rank-0.json", call, copy)))
    detail = steps[-1].detail
    assert detail is not None
    # Before it, between the steps, the host was in no call for 4 ms.
    assert detail.host.keys() == {"python", "synchronize" if waits else "launch"}
    assert detail.host["synchronize" if waits else "launch"] == pytest.approx(1.2e-3, abs=0.2e-3)
