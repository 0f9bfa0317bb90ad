"""A recorded run's step account against the same buckets derived another way from the full traces of the same steps.

    python benchmarks/account_check.py RUN

RUN was recorded with `keep_traces=True` on GPUs, so that each sampled step's trace lies beside the account that the
recorder made of it. Here the traces are read with `json` and painted: one cell for every half microsecond of the step,
first what moved data, over it what waited for the host, over that the kernels at work. No code is shared with the
package but the words. Prints each bucket above 1% of the step both ways, and exits with 1 where one is further off
than 5%, or where more than 2% of a step is in `other`.
"""

import argparse
import gzip
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

CELL_US = 0.5
# A launch reaches an idle device within this.
ARRIVES_US = 10.0
# What is worth comparing, how near it must be, and how much may be left over, as shares.
WORTH, NEAR, LEFT = 0.01, 0.05, 0.02

Event = dict[str, Any]
Account = dict[str, float]


class Step:
    """One rank's traced step, painted. Times are microseconds on the trace's clock."""

    def __init__(self, path: Path) -> None:
        raw = path.read_bytes()
        events = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)["traceEvents"]
        whole = [e for e in events if e.get("ph") == "X"]
        self.host = [
            e for e in whole if e.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset", "gpu_user_annotation")
        ]
        self.device = sorted(
            (e for e in whole if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")), key=lambda e: e["ts"]
        )
        self.calls = {e["args"]["correlation"]: e for e in whole if e.get("cat") in ("cuda_runtime", "cuda_driver")}
        self.begin, self.end = self.window()
        self.paint()

    def launch(self, event: Event) -> float:
        """When the host began to launch a device event."""
        call = self.calls.get(event["args"].get("correlation"))
        return call["ts"] if call else event["ts"]

    def window(self) -> tuple[float, float]:
        """The step's begin and end on the device, or on the host where that is behind it."""
        marks = sorted((e["ts"], e["ts"] + e["dur"]) for e in self.host if e["name"] == "meshwright.step")
        opened, closed = marks[-1]
        ends = [(self.launch(e), e["ts"] + e["dur"]) for e in self.device]
        begin = max([end for at, end in ends if at < opened], default=opened)
        end = max([end for at, end in ends if opened <= at <= closed], default=closed)
        return max(begin, opened), max(end, closed)

    def cells(self, start: float, end: float) -> slice:
        """The cells between two moments."""
        first, last = (round((at - self.begin) / CELL_US) for at in (start, end))
        return slice(max(0, first), max(0, last))

    def paint(self) -> None:
        """Fill `self.what`: for each cell the name of its bucket."""
        self.names = ["other"]
        self.what = np.zeros(round((self.end - self.begin) / CELL_US), dtype=np.int16)
        self.transfers = [e for e in self.device if is_transfer(e)]
        work = [e for e in self.device if not is_transfer(e) and e["ts"] + e["dur"] > self.begin and e["ts"] < self.end]
        self.moving = np.zeros(self.what.shape, dtype=bool)
        for event in self.transfers:
            where = self.cells(event["ts"], event["ts"] + event["dur"])
            self.moving[where] = True
        free = self.begin
        late = np.zeros(self.what.shape, dtype=bool)
        for event in work:
            call = self.calls.get(event["args"].get("correlation"), event)
            told = call["ts"] + call["dur"]
            if event["ts"] > free and told > free:
                late[self.cells(free, event["ts"] if event["ts"] - told <= ARRIVES_US else told)] = True
            free = max(free, event["ts"] + event["dur"])
        last = max((e["ts"] + e["dur"] for e in self.device if e["ts"] < self.end), default=self.begin)
        late[self.cells(last, self.end)] = True
        self.late = late
        self.busy = np.zeros(self.what.shape, dtype=bool)
        for event in work:
            self.busy[self.cells(event["ts"], event["ts"] + event["dur"])] = True
        self.book(work)

    def book(self, work: list[Event]) -> None:
        """Paint from the weakest claim to the strongest."""
        self.color("transfer", self.moving)
        self.color("host", self.late)
        loading = np.zeros(self.what.shape, dtype=bool)
        for event in self.host:
            if event["name"] == "meshwright.input" or str(event["name"]).startswith("enumerate(DataLoader)"):
                loading[self.cells(event["ts"], event["ts"] + event["dur"])] = True
        self.color("input", self.late & loading)
        kinds = {id(event): self.kind(event) for event in work}
        for kind in ("compute", "recompute", "optimizer"):
            for event in work:
                if kinds[id(event)] == kind:
                    self.what[self.cells(event["ts"], event["ts"] + event["dur"])] = self.index(kind)

    def color(self, name: str, where: np.ndarray) -> None:
        self.what[where] = self.index(name)

    def index(self, name: str) -> int:
        if name not in self.names:
            self.names.append(name)
        return self.names.index(name)

    def kind(self, event: Event) -> str:
        """Whether a kernel is compute, recompute or the optimizer's, by what was going on where it was launched."""
        at = self.launch(event)
        if any(start <= at <= end for start, end in self.updates()):
            return "optimizer"
        return "recompute" if any(start <= at <= end for start, end in self.redone()) else "compute"

    def updates(self) -> list[tuple[float, float]]:
        """From the last backward node before each optimizer step to that step's end."""
        if "_updates" not in self.__dict__:
            steps = merged([e for e in self.host if str(e["name"]).startswith("Optimizer.")])
            nodes = sorted(e["ts"] + e["dur"] for e in self.host if "evaluate_function" in str(e["name"]))
            self._updates = []
            for start, end in steps:
                before = [at for at in nodes if at <= start]
                first = str(next(e["name"] for e in self.host if e["ts"] == start and str(e["name"]).startswith("Opt")))
                # Gradients are cleared at a step's begin or end, and nothing is clipped before that.
                self._updates.append((before[-1] if before and "zero_grad" not in first else start, end))
        return self._updates

    def redone(self) -> list[tuple[float, float]]:
        """Operators inside backward nodes that record gradients."""
        if "_redone" not in self.__dict__:
            nodes = merged([e for e in self.host if "evaluate_function" in str(e["name"])])
            self._redone = merged(
                [
                    e
                    for e in self.host
                    if e.get("cat") == "cpu_op"
                    and "Sequence number" in e.get("args", {})
                    and not str(e["name"]).startswith("autograd::")
                    and "Backward" not in str(e["name"])
                    and any(start <= e["ts"] <= end for start, end in nodes)
                ]
            )
        return self._redone


def is_transfer(event: Event) -> bool:
    """Whether a device event is a collective's kernel."""
    return "nccl" in str(event["name"]).lower()


def merged(events: list[Event]) -> list[tuple[float, float]]:
    """The time that some events cover, as disjoint stretches."""
    found: list[tuple[float, float]] = []
    for start, end in sorted((e["ts"], e["ts"] + e["dur"]) for e in events):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found
