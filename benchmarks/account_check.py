"""The step accounts that `meshwright explain` gives, against the same buckets derived another way from the same traces.

    python benchmarks/account_check.py RUN | TRACES...

RUN is a folder that was recorded on GPUs with `keep_traces=True`: each sampled step's trace lies beside the account
that the recorder made of it. TRACES are folders, or files, with a trace of each rank, of which each folder and all the
files together are one program; they hold the profiler's own marks of steps. All ranks on one host: their clocks agree.

The derivation follows docs/accounts.md and shares no code with the package: a step is cut wherever anything begins or
ends, and every piece is painted, first with what moved data, over it what waited for the host, over that the kernels at
work. Collectives are matched between ranks by when they end. Prints each bucket above 1% of a rank's step both ways,
means over steps; exits with 1 where one is further off than 5%, or where more than 2% of a step is in `other`.
"""

import argparse
import ast
import gzip
import json
import sys
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np

import meshwright as mw
from meshwright.explain.explanation import MeasuredSteps

# What is worth comparing, how near it must be, and how much may be left over, as shares.
WORTH, NEAR, LEFT = 0.01, 0.05, 0.02
# docs/accounts.md: what a launch takes to reach an idle device, and a queued kernel to start.
ARRIVES_US, STARTS_US = 10.0, 5.0
# The ends of one collective on two ranks lie no further apart than this.
TOGETHER_US = 500.0
# What moves a model's own numbers, unless it sums fewer bytes than this: counts, losses and norms.
MOVING = ("allreduce", "allgather", "reducescatter", "alltoall")
SMALL_BYTES = 64 * 1024
ELEMENT_BYTES = {"Byte": 1, "Char": 1, "Bool": 1, "Half": 2, "BFloat16": 2, "Double": 8, "Long": 8}

Event = dict[str, Any]
Account = dict[str, float]
Spans = list[tuple[float, float]]


class Transfer(NamedTuple):
    """A collective as one rank saw it; mine: the pieces of the step that it explains, microseconds."""

    start: float
    end: float
    purpose: str
    ranks: tuple[int, ...]
    mine: Spans


class Step(NamedTuple):
    """One rank's step: its length and buckets, microseconds, with waits still in the transfers."""

    wall: float
    buckets: Account
    transfers: list[Transfer]


class Trace:
    """One rank's trace, by what its events are."""

    def __init__(self, path: Path) -> None:
        raw = path.read_bytes()
        whole = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
        events = sorted((e for e in whole["traceEvents"] if e.get("ph") == "X"), key=lambda e: e["ts"])
        self.rank = int(whole.get("distributedInfo", {}).get("rank", 0))
        self.device = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
        if not self.device:
            sys.exit(f"{path} holds no kernels: this checks accounts of GPUs")
        self.calls = {e["args"]["correlation"]: e for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver")}
        self.operators = [e for e in events if e.get("cat") == "cpu_op"]
        self.marks = [e for e in events if e.get("cat") == "user_annotation"]
        self.records = [e for e in self.operators if e["name"] == "record_param_comms"]
        self.nodes = [e for e in self.operators if "evaluate_function" in e["name"]]

    def steps(self) -> dict[int, Event]:
        """The profiler's marks of steps, by number; the first has nothing before it that would say where it begins."""
        found = {int(e["name"].split("#")[1]): e for e in self.marks if e["name"].startswith("ProfilerStep#")}
        return {number: found[number] for number in sorted(found)[1:]}

    def sample(self) -> Event:
        """The step that a recorder annotated last, which is the one that it measured."""
        return next(e for e in reversed(self.marks) if e["name"] == "meshwright.step")

    def called(self, event: Event) -> tuple[float, float]:
        """When the host launched a device event, from and to."""
        return span(self.calls.get(event["args"].get("correlation"), event))


def span(event: Event) -> tuple[float, float]:
    """From and to."""
    return event["ts"], event["ts"] + event["dur"]


def is_transfer(event: Event) -> bool:
    """Whether a device event is a collective's kernel."""
    return "nccl" in event["name"].lower()


class Canvas:
    """A step cut at every moment at which anything begins or ends; a mask says for each piece whether it is covered."""

    def __init__(self, begin: float, end: float, *many: Iterable[tuple[float, float]]) -> None:
        edges = np.array([at for spans in many for pair in spans for at in pair] + [begin, end])
        self.edges = np.unique(np.clip(edges, begin, end))
        self.lengths = np.diff(self.edges)

    def cover(self, spans: Iterable[tuple[float, float]]) -> np.ndarray:
        """Which pieces lie in any of some spans, whose ends are edges of the canvas."""
        depth = np.zeros(len(self.edges), dtype=np.int64)
        for start, end in spans:
            first, last = np.searchsorted(self.edges, (start, max(start, end)))
            depth[min(first, len(depth) - 1)] += 1
            depth[min(last, len(depth) - 1)] -= 1
        return np.cumsum(depth)[:-1] > 0


def derive(trace: Trace, mark: Event) -> Step:
    """The step that a mark on the host bounds, painted."""
    opened, closed = span(mark)
    told = [(trace.called(e), span(e)) for e in trace.device]
    begin = max([end for (at, _), (_, end) in told if at < opened] + [opened])
    end = max([end for (at, _), (_, end) in told if opened <= at <= closed] + [closed])
    inside = [e for e in trace.device if begin < span(e)[1] and e["ts"] < end]
    work = [e for e in inside if not is_transfer(e)]
    moved = [e for e in inside if is_transfer(e)]

    updating = updates(trace, opened, closed)
    again = redone(trace, opened, closed)
    kinds = [kind_of(trace.called(e)[0], updating, again) for e in work]
    spans, late = run_and_wait(trace, work, begin)
    late.append((max(span(e)[1] for e in inside), end))
    loading = [
        span(e) for e in trace.marks if e["name"] == "meshwright.input" or e["name"].startswith("enumerate(DataLoader)")
    ]
    hosted = on_host(trace, mark, updating)
    transfers = [span(e) for e in moved]

    canvas = Canvas(begin, end, spans, late, loading, hosted, transfers)
    names = np.full(len(canvas.lengths), "other", dtype="<U20")
    owner = np.full(len(canvas.lengths), -1)
    for number in sorted(range(len(moved)), key=lambda i: transfers[i][1]):
        # What ends an idle stretch is the transfer in it that ends last.
        owner[canvas.cover([transfers[number]])] = number
    waiting = canvas.cover(late)
    names[waiting] = "host"
    names[waiting & canvas.cover(loading)] = "input"
    running = canvas.cover(span(e) for e in inside)
    names[canvas.cover(hosted) & ~running] = "optimizer"
    for kind in ("compute", "recompute", "optimizer"):
        names[canvas.cover(one for one, own in zip(spans, kinds, strict=True) if own == kind)] = kind
    free = names == "other"
    kept: list[Transfer] = []
    for number, event in enumerate(moved):
        own = np.flatnonzero(free & (owner == number))
        purpose, ranks = purpose_of(trace, event, opened, closed)
        kept.append(Transfer(*transfers[number], purpose, ranks, [(canvas.edges[i], canvas.edges[i + 1]) for i in own]))
    buckets = {name: float(canvas.lengths[names == name].sum()) for name in np.unique(names)}
    buckets["other"] = float(canvas.lengths[free & (owner < 0)].sum())
    buckets["contention"] = slowed(work, kinds, transfers)
    return Step(end - begin, buckets, kept)


def run_and_wait(trace: Trace, work: Sequence[Event], begin: float) -> tuple[Spans, Spans]:
    """When each kernel runs, the start of a queued one included; and when none runs for want of a launch."""
    spans: Spans = []
    late: Spans = []
    free = begin
    for event in work:
        start, end = span(event)
        launched = trace.called(event)[1]
        if launched <= free < start <= free + STARTS_US:
            spans.append((free, end))
        else:
            spans.append((start, end))
        if free < launched and free < start:
            late.append((free, start if start - launched <= ARRIVES_US else launched))
        free = max(free, end)
    return spans, late


def kind_of(moment: float, updating: Spans, again: Spans) -> str:
    """What a kernel is that was launched at this moment."""
    for kind, spans in (("optimizer", updating), ("recompute", again)):
        if any(start <= moment <= end for start, end in spans):
            return kind
    return "compute"


def updates(trace: Trace, opened: float, closed: float) -> Spans:
    """Clipping, stepping and clearing gradients: from the last thing that the backward pass did to the step's end."""
    told = [span(e) for e in trace.marks if e["name"] == "meshwright.optimizer" and opened <= e["ts"] < closed]
    if told:
        return told
    marks = [e for e in trace.marks if e["name"].startswith("Optimizer.") and opened <= e["ts"] < closed]
    backward = [*trace.nodes, *(e for e in [*trace.marks, *trace.operators] if is_backward(e["name"]))]
    ends = sorted(span(e)[1] for e in backward if opened <= e["ts"] < closed)
    found = [span(e) for e in marks]
    for start, end in [span(e) for e in marks if e["name"].startswith("Optimizer.step")]:
        before = bisect_right(ends, start)
        if before:
            found.append((ends[before - 1], end))
    return found


def is_backward(name: str) -> bool:
    """Whether a mark is of what wrappers do at the end of the backward pass."""
    return name.startswith("torch.distributed.ddp.reducer::") or ("FSDP::" in name and "backward" in name)


def redone(trace: Trace, opened: float, closed: float) -> Spans:
    """Operators in nodes of the backward pass that prepare another backward pass: the forward pass, run again."""
    told = [span(e) for e in trace.marks if e["name"] == "meshwright.recompute" and opened <= e["ts"] < closed]
    found: Spans = []
    until: dict[Any, float] = {}
    for event in trace.operators:
        if not opened <= event["ts"] < closed:
            continue
        name, thread = event["name"], event["tid"]
        if "evaluate_function" in name:
            until[thread] = max(until.get(thread, 0.0), span(event)[1])
        elif event["ts"] < until.get(thread, 0.0) and name.startswith("aten::") and "Sequence number" in event["args"]:
            found.append(span(event))
    return told or found


def on_host(trace: Trace, mark: Event, updating: Spans) -> Spans:
    """Operators of the update that launch nothing: the host's cores are at work."""
    thread = mark["tid"]
    calls = np.array(sorted(e["ts"] for e in trace.calls.values() if e["tid"] == thread))
    found: Spans = []
    free = 0.0
    for event in trace.operators:
        start, end = span(event)
        if event["tid"] == thread and start >= free and any(a <= start <= b for a, b in updating):
            free = end
            if not np.any((calls >= start) & (calls <= end)):
                found.append((start, end))
    return found


def purpose_of(trace: Trace, event: Event, opened: float, closed: float) -> tuple[str, tuple[int, ...]]:
    """What a collective was for, by its kind, its size and when it was launched; and who takes part."""
    at = trace.called(event)[0]
    before = bisect_right([e["ts"] for e in trace.records], at)
    record = trace.records[before - 1]["args"] if before else {}
    kind = kind_in(record)
    ranks = tuple(ast.literal_eval(record.get("Process Group Ranks") or "[]"))
    if "SendRecv" in event["name"]:
        return "comm.pipeline", ()
    if kind not in MOVING or (kind == "allreduce" and sent_bytes(record) < SMALL_BYTES):
        return "comm.control", ranks
    marks = [e["name"] for e in trace.marks if opened <= e["ts"] < closed]
    if any("FSDP::" in name or "FullyShardedDataParallel" in name for name in marks):
        return "comm.shard", ranks
    # Gradients exist in the backward pass only: what is summed or gathered before it is the model's own.
    backward = min((e["ts"] for e in trace.nodes if opened <= e["ts"] < closed), default=closed)
    forward = [e["args"] for e in trace.records if opened <= e["ts"] < backward]
    split = any(kind_in(args) in MOVING and sent_bytes(args) >= SMALL_BYTES for args in forward)
    return "comm.tensor" if split else "comm.replica", ranks


def kind_in(record: Event) -> str:
    """The collective that a record names, whichever of its variants."""
    name = str(record.get("Collective name", "")).replace("_", "")
    return next((kind for kind in MOVING if kind in name), name)


def sent_bytes(record: Event) -> int:
    """The size of what a record says a rank gave to its collective."""
    return record.get("In msg nelems", 0) * ELEMENT_BYTES.get(record.get("dtype", ""), 4)


def slowed(work: Sequence[Event], kinds: Sequence[str], transfers: Spans) -> float:
    """How much longer the model's kernels took beside a transfer than the median of the same ones alone."""
    alone: dict[str, list[float]] = defaultdict(list)
    beside: dict[str, list[float]] = defaultdict(list)
    for event, kind in zip(work, kinds, strict=True):
        if kind == "compute":
            start, end = span(event)
            args = event["args"]
            same = f"{event['name']} {args.get('grid')} {args.get('block')}"
            overlaps = any(a < end and start < b for a, b in transfers)
            (beside if overlaps else alone)[same].append(event["dur"])
    lost = sum(d - median(alone[same]) for same, own in beside.items() if same in alone for d in own)
    return max(0.0, lost)


def settle(ranks: dict[int, Step]) -> dict[int, Account]:
    """One step of all ranks: what each waited for the last participant of its collectives stands apart."""
    found: dict[int, Account] = {}
    for rank, step in ranks.items():
        account = defaultdict(float, step.buckets)
        for transfer in step.transfers:
            ready = max([transfer.start, *(one.start for one in partners(rank, transfer, ranks))])
            waited = sum(max(0.0, min(end, ready) - start) for start, end in transfer.mine)
            account[transfer.purpose] += sum(end - start for start, end in transfer.mine) - waited
            account[f"waited at {transfer.purpose}"] += waited
        found[rank] = account
    along = any(one.purpose == "comm.pipeline" for step in ranks.values() for one in step.transfers)
    passes = ("compute", "recompute", "host", "input", "comm.shard", "comm.tensor")
    busy = {rank: sum(account[name] for name in passes) for rank, account in found.items()}
    for rank, account in found.items():
        waits = {name: account.pop(name) for name in list(account) if name.startswith("waited at ")}
        in_turn = sum(waits.pop(f"waited at comm.{name}", 0.0) for name in ("pipeline", "control") if along)
        account["imbalance"] = min(in_turn, max(busy.values()) - busy[rank])
        account["bubble"] = in_turn - account["imbalance"]
        account["straggler"] = sum(waits.values())
    return {rank: dict(account) for rank, account in found.items()}


def partners(rank: int, transfer: Transfer, ranks: dict[int, Step]) -> list[Transfer]:
    """The same collective on other ranks: what ends together with it, there and here nearest to each other."""
    found: list[Transfer] = []
    for other, step in ranks.items():
        alike = [one for one in step.transfers if one.purpose == transfer.purpose]
        if other == rank or not alike or (transfer.ranks and other not in transfer.ranks):
            continue
        one = min(alike, key=lambda one: abs(one.end - transfer.end))
        own = [mine for mine in ranks[rank].transfers if mine.purpose == transfer.purpose]
        back = min(own, key=lambda mine: abs(mine.end - one.end))
        if back is transfer and abs(one.end - transfer.end) < TOGETHER_US:
            found.append(one)
    return found


def derive_steps(paths: Sequence[Path], numbers: Sequence[int]) -> list[dict[int, Account]]:
    """Accounts of some steps, or, of a recorder's trace, of the one that it sampled, by rank; "wall": their length."""
    traces = [Trace(path) for path in paths]
    found: list[dict[int, Account]] = []
    for number in numbers:
        ranks = {trace.rank: derive(trace, trace.steps().get(number) or trace.sample()) for trace in traces}
        found.append({rank: account | {"wall": ranks[rank].wall} for rank, account in settle(ranks).items()})
    return found


def traces_of(folder: Path) -> list[Path]:
    """The traces of a folder."""
    return sorted(path for path in folder.glob("*rank*") if path.name.endswith((".json", ".json.gz")))


def compare(name: str, step: MeasuredSteps, derived: list[dict[int, Account]]) -> bool:
    """Print one program's table; whether all is as near as it must be."""
    good = True
    print(f"\n{name}: steps {', '.join(map(str, step.steps))}; ms as explained, ms as derived")
    for rank, account in step.ranks.items():
        wall = fmean(one[rank]["wall"] for one in derived) / 1e3
        told = {name: seconds * 1e3 for name, seconds in account.rows()}
        told["compute"] = told.pop("useful") + told.pop("inefficiency") + told["contention"]
        print(f"  rank {rank}: step {account.total() * 1e3:.2f}, {wall:.2f}; other {told['other'] / wall:.2%}")
        good &= told["other"] <= LEFT * wall
        for bucket in sorted({*told, *(name for one in derived for name in one[rank])} - {"wall", "other"}):
            mine = told.get(bucket, 0.0)
            other = fmean(one[rank].get(bucket, 0.0) for one in derived) / 1e3
            if max(mine, other) > WORTH * wall:
                off = mine / other - 1 if other else float("inf")
                good &= abs(off) <= NEAR
                print(f"    {bucket:<14}{mine:>9.2f}{other:>9.2f}{off:>8.1%}{'' if abs(off) <= NEAR else '  <-- off'}")
    return good


def check(paths: Sequence[Path]) -> bool:
    """Compare what is in one run, in one folder of traces, or in some files."""
    runs = sorted(paths[0].glob("attempts/*/traces"), key=lambda path: int(path.parent.name))
    files = [file for path in paths for file in (traces_of(path) if path.is_dir() else [path])]
    ours = mw.explain(paths[0] if runs else files)
    if ours.step is None:
        sys.exit(f"{paths[0]}: no step was measured on every rank")
    numbers = ours.step.steps
    if runs:
        derived = [one for n in numbers for one in derive_steps(traces_of(runs[-1] / f"step-{n}"), [n])]
    else:
        derived = derive_steps(files, numbers)
    return compare(ours.name, ours.step, derived)


def main() -> None:
    """Check all that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN|TRACES")
    paths = parser.parse_args().paths
    folders = [[path] for path in paths if path.is_dir()]
    files = [path for path in paths if not path.is_dir()]
    results = [check(group) for group in [*folders, *([files] if files else [])]]
    bounds = f"each bucket above {WORTH:.0%} within {NEAR:.0%}, other below {LEFT:.0%}"
    print(f"\n{sum(results)} of {len(results)} agree: {bounds}")
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
