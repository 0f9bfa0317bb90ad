"""Traces in place of a run: one file a rank, or with several ranks of one process, whatever program wrote them."""

import gzip
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from meshwright.account import PURPOSES, MeasuredStep, Purpose, RunAccount
from meshwright.explain.advice import give_advice
from meshwright.explain.case import build_case, has_details
from meshwright.explain.explanation import Explanation, MemoryComparison, RunLife
from meshwright.explain.program import MOST_RANKS, is_jax, notes_on_program, program_device
from meshwright.explain.reading import RankTrace, Reader, Told, read_ranks
from meshwright.explain.steps import poor_account, resolve_steps, summarise
from meshwright.explain.words import NAMED, counted, ranks_text
from meshwright.record import Program, Step
from meshwright.spec import SettingError
from meshwright.spec.devices import NODES
from meshwright.spec.errors import closest
from meshwright.spec.hardware import closest_device

NAMES = ("*.json", "*.json.gz")
# Where JAX's profiler puts its traces, under the folder that it was told.
JAX_FOLDERS = "plugins/profile/*"
# A second writing of the trace beside it, for another viewer (create_perfetto_trace=True).
JAX_COPY = "perfetto_trace.json.gz"
# A trace says what it is near its begin; other JSON that lies in the same folder does not say this.
SNIFFED_BYTES = 2**16
SIGNS = (b'"traceEvents"', b'"schemaVersion"', b'"displayTimeUnit"', b'"ph"')


class Useful(msgspec.Struct, frozen=True, kw_only=True):
    """What no trace says: model FLOPs of a rank's step, and the GPU by its name in the hardware table."""

    flops_per_step: float
    gpu: str


def traces_in(folder: Path) -> list[Path]:
    """The traces that lie in a folder, or that JAX's profiler put under it last; none where it holds none."""
    profiled = sorted(path for path in jax_root(folder).glob(JAX_FOLDERS) if path.is_dir())
    for place in (folder, *profiled[-1:]):
        found = {path for name in NAMES for path in place.glob(name) if path.is_file() and looks_like_a_trace(path)}
        found = {path for path in found if path.name != JAX_COPY} or found
        if found:
            return sorted(found, key=lambda path: (number_in(path), path.name))
    return []


def jax_root(folder: Path) -> Path:
    """The folder that JAX's profiler was told, where one of those that it made there is given."""
    names = folder.absolute().parts
    if names[-2:] == ("plugins", "profile"):
        return folder.absolute().parent.parent
    return folder.absolute().parent if names[-1:] == ("plugins",) else folder


def looks_like_a_trace(path: Path) -> bool:
    """Whether a file's begin is a trace's: other JSON may lie beside it."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            begin = file.read(SNIFFED_BYTES)
    except (OSError, EOFError, zlib.error):
        return False
    return any(sign in begin for sign in SIGNS)


def number_in(path: Path) -> int:
    """The rank in a file's name: the number behind "rank", or the only one; -1 where there is none."""
    named = re.search(r"rank\D?(\d+)", path.name, re.IGNORECASE)
    numbers = [named[1]] if named else re.findall(r"\d+", path.name)
    return int(numbers[0]) if len(numbers) == 1 and len(numbers[0]) <= len(str(MOST_RANKS)) else -1


def explain_traces(
    paths: Sequence[Path],
    useful: Useful | None = None,
    read: Reader | None = None,
    purposes: Mapping[str, str] | None = None,
) -> Explanation:
    """What traces of one program tell together. Raises SettingError where they are no traces, or not of one program.

    read: what reads one file, in place of `read_ranks`. purposes: of process groups or collectives, by name.
    """
    told = Told(useful_s=useful_seconds(useful) if useful is not None else 0.0, purposes=known_purposes(purposes or {}))
    traces, notes = ranked([trace for path in paths for trace in (read or read_ranks)(path, told)])
    check_carriers(told.purposes, traces.values())
    world_size = world_of(traces)
    program = program_of_traces(traces, world_size, useful)
    events = {rank: of_rank(trace.steps, rank) for rank, trace in traces.items() if trace.steps}
    if not events:
        raise SettingError(
            str(paths[0]), "holds no whole step", "a trace of several steps, with profiler.step() in each"
        )
    steps = resolve_steps(events)
    step = summarise([one.resolved for ranks in steps for one in ranks]) if steps else None
    missing = tuple(rank for rank in range(world_size) if rank not in traces)
    notes += notes_on_traces(traces, missing, whole=step is not None)
    notes += notes_on_program(program, step, traced=True)
    if step is not None and (poor := poor_account(step)):
        notes.append(poor)
    device = NODES[useful.gpu].device if useful is not None else program_device(program)
    case = build_case(steps, kind=program.kind, device=device, jax=is_jax(program)) if steps else None
    return Explanation(
        path=str(paths[0] if len(paths) == 1 else paths[0].parent),
        name=program.name,
        job=None,
        job_toml="",
        attempts=0,
        attempt=None,
        world_size=world_size,
        ranks=tuple(traces),
        missing_ranks=missing,
        ending=f"{counted(len(steps), 'step')} of {of_files(traces)}",
        metrics=(),
        evaluations=(),
        prediction=None,
        step=step,
        difference=None,
        step_s=None,
        memory=MemoryComparison(predicted=None, measured=None, rank=None, ranks={}),
        life=RunLife(account=RunAccount(), yield_=None),
        faults=(),
        findings=(),
        notes=tuple(notes),
        program=program,
        detail=case.detail if case is not None and has_details(steps) else None,
        advice=give_advice(case) if case is not None else (),
        traces=tuple(dict.fromkeys(str(trace.path) for trace in traces.values())),
    )


def useful_seconds(useful: Useful) -> float:
    """Seconds of a step at the GPU's dense bf16 peak."""
    if useful.gpu not in NODES:
        raise SettingError(f"--gpu {useful.gpu}", "is not in the hardware table", f"--gpu {closest_device(useful.gpu)}")
    if not 0 < useful.flops_per_step < float("inf"):
        raise SettingError(f"--flops-per-step {useful.flops_per_step:g}", "must be above 0", "--flops-per-step 1e14")
    return useful.flops_per_step / NODES[useful.gpu].device.peak_flops_per_s("bf16")


def known_purposes(given: Mapping[str, str]) -> dict[str, Purpose]:
    """The same, each of them a purpose of the step account."""
    known: dict[str, Purpose] = {purpose: purpose for purpose in PURPOSES}
    for name, purpose in given.items():
        if purpose not in known:
            near = closest(purpose, known)
            nearest = f"--purpose {name}={near}" if near in known else f"one of {near}"
            raise SettingError(f"--purpose {name}={purpose}", "is no purpose of a transfer", nearest)
    return {name: known[purpose] for name, purpose in given.items()}


def check_carriers(purposes: Mapping[str, Purpose], traces: Iterable[RankTrace]) -> None:
    """Refuse a purpose of what no trace holds."""
    # A kind of collective is shorter than the instructions of that kind.
    carriers = sorted({name for trace in traces for name in trace.carriers}, key=lambda name: (len(name), name))
    for name, purpose in purposes.items():
        if name not in carriers:
            near = closest(name, carriers[:NAMED])
            nearest = f"--purpose {near}={purpose}" if near in carriers else f"one of {near}" if near else "none"
            raise SettingError(f"--purpose {name}={purpose}", "names nothing that a trace holds", nearest)


def of_files(traces: Mapping[int, RankTrace]) -> str:
    """ "4 traces", or "8 devices in 2 traces"."""
    files = len({trace.path for trace in traces.values()})
    one_each = all(trace.place < 0 for trace in traces.values())
    return counted(files, "trace") if one_each else f"{counted(len(traces), 'device')} in {counted(files, 'trace')}"


def ranked(traces: Iterable[RankTrace]) -> tuple[dict[int, RankTrace], list[str]]:
    """Each rank's trace, by what it says itself, else by its file's name, else in the order given, with a note."""
    traces = list(traces)
    producers = {trace.producer: trace.path for trace in traces}
    if len(producers) > 1:
        (one, first), (two, other), *_ = producers.items()
        raise SettingError(str(other), f"is of {two}, and {first} of {one}", "traces of one program")
    if any(trace.place >= 0 for trace in traces):
        return devices_ranked(traces)
    found: dict[int, RankTrace] = {}
    unnamed: list[RankTrace] = []
    for trace in traces:
        rank = trace.rank if trace.rank >= 0 else number_in(trace.path)
        if rank < 0:
            unnamed.append(trace)
            continue
        if rank in found:
            raise SettingError(str(trace.path), f"is of rank {rank}, as {found[rank].path} is", "one trace a rank")
        found[rank] = trace
    notes: list[str] = []
    for trace in unnamed:
        rank = next(rank for rank in range(len(found) + 1) if rank not in found)
        found[rank] = trace
        if len(found) > 1:
            notes.append(f"{trace.path.name} does not say its rank: taken for rank {rank}, by the order given.")
    return dict(sorted(found.items())), notes


def devices_ranked(traces: Sequence[RankTrace]) -> tuple[dict[int, RankTrace], list[str]]:
    """Every device of every file, in the order of their numbers, or, where files have the same ones, file by file.

    With a note where a rank is not the device's number: JAX leaves gaps between those of two processes.
    """
    own: set[tuple[Path, int]] = set()
    for trace in traces:
        if (trace.path, trace.place) in own:
            raise SettingError(str(trace.path), "is given twice", "each trace once")
        own.add((trace.path, trace.place))
    if len({trace.place for trace in traces}) == len(traces):
        traces = sorted(traces, key=lambda trace: trace.place)
    found = dict(enumerate(traces))
    if all(rank == trace.place for rank, trace in found.items()):
        return found, []
    files: dict[Path, list[int]] = {}
    for rank, trace in found.items():
        files.setdefault(trace.path, []).append(rank)
    alike = len({path.name for path in files}) < len(files)
    told = [f"{ranks_text(ranks)} of {path if alike else path.name}" for path, ranks in files.items()]
    return found, [f"Traces of JAX do not say their ranks, so devices are numbered in turn: {'; '.join(told)}."]


def world_of(traces: Mapping[int, RankTrace]) -> int:
    """Ranks of the program. Raises SettingError where the traces do not agree on it."""
    told = {trace.world_size: trace for trace in traces.values() if trace.world_size > 0}
    if len(told) > 1:
        (one, first), (two, other), *_ = told.items()
        reason = f"is of a program of {counted(two, 'rank')}, and {first.path} of one of {one}"
        raise SettingError(str(other.path), reason, "traces of one program")
    size = max(told, default=0)
    last = max(traces)
    if size and last >= size:
        reason = f"is of rank {last} of a program of {counted(size, 'rank')}"
        raise SettingError(str(traces[last].path), reason, "traces of one program")
    return size if last < size <= MOST_RANKS else last + 1


def program_of_traces(traces: Mapping[int, RankTrace], world_size: int, useful: Useful | None) -> Program:
    """What the traces, and who gave them, say of the program."""
    first = next(iter(traces.values()))
    one = first.path.name.removesuffix(".gz").removesuffix(".json")
    folder = first.path.absolute().parent
    if folder.parent.parts[-2:] == ("plugins", "profile"):
        folder = folder.parents[2]
    device = useful.gpu if useful is not None else first.device
    return Program(
        name=one if len(traces) == 1 else folder.name,
        trainer=first.producer,
        versions={},
        device=device or {"cpu": "cpu process", "cuda": "GPU"}.get(first.kind, "device"),
        kind=first.kind,
        world_size=world_size,
        peak_flops_per_s=NODES[useful.gpu].device.peak_flops_per_s("bf16") if useful is not None else None,
        flops_per_step=useful.flops_per_step if useful is not None else None,
        flops_from="given" if useful is not None else "are in no trace (--flops-per-step, with --gpu, gives them)",
    )


def of_rank(steps: Iterable[Step], rank: int) -> list[Step]:
    """Steps as the rank's that it turned out to be."""
    # Hosts are not named reliably, so clocks are compared by when collectives end, as between any two hosts.
    return [msgspec.structs.replace(line, measured=as_rank(line.measured, rank)) for line in steps]


def as_rank(measured: MeasuredStep, rank: int) -> MeasuredStep:
    """A measured step of that rank, on a clock of its own."""
    alone = (measured.rank,)
    transfers = tuple(
        # Of whose peers nothing is known: it must not meet one of the rank that had this number.
        msgspec.structs.replace(transfer, ranks=(rank,)) if transfer.ranks == alone else transfer
        for transfer in measured.transfers
    )
    return msgspec.structs.replace(measured, rank=rank, host=f"rank {rank}", transfers=transfers)


def notes_on_traces(traces: Mapping[int, RankTrace], missing: Sequence[int], *, whole: bool) -> list[str]:
    """What the traces lack."""
    notes = list(dict.fromkeys(note for trace in traces.values() for note in trace.notes))
    if missing:
        notes.append(f"No trace of {ranks_text(missing)}: waits for them show as transfer.")
    empty = [rank for rank, trace in traces.items() if not trace.steps]
    if empty:
        notes.append(f"The trace of {ranks_text(empty)} holds no whole step; waits for them show as transfer.")
    if not whole:
        notes.append("No step is in the traces of all ranks, so there is no step account: profile the same steps.")
    return notes
