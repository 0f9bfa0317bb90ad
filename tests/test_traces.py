"""Reading profiler traces: of any version, in pieces of any size, and none that is broken."""

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import traces

from meshwright.record.kineto.event import Event
from meshwright.record.kineto.reading import read_trace
from meshwright.record.kineto.trace import Trace
from meshwright.spec import SettingError

WHOLE = (-1.0, 1e9)
# Address space: names may take 256 MiB, one value 16 MiB and its objects twenty times as much.
MEMORY = 700 << 20


def everything(trace: Trace) -> list[Event]:
    return list(trace.within(*WHOLE))


def refused(path: Path) -> SettingError:
    """Why a file is refused, in one line that names it."""
    with pytest.raises(SettingError) as caught:
        read_trace(path)
    assert caught.value.setting == str(path)
    assert caught.value.nearest and "\n" not in str(caught.value)
    return caught.value


# --- What is read ----------------------------------------------------------------------------------------------------


def test_a_trace_of_today(tmp_path: Path):
    trace = read_trace(traces.write(tmp_path, traces.kineto(traces.steps(2))))
    assert (trace.rank, trace.world_size, trace.producer) == (3, 4, "kineto")
    assert (trace.host, trace.device) == ("node-7", "NVIDIA H200")
    assert trace.groups == {"0": ("default_pg", (0, 1, 2, 3)), "17": ("mesh_shard", (2, 3))}
    assert trace.base_s == pytest.approx(1790857026 + traces.BEGIN * 1e-6, abs=1e-6)
    assert trace.dropped == {"metadata": 2, "python_function": 2, "flow": 2, "instant": 2, "gpu_user_annotation": 2}
    assert trace.notes == ()
    assert len(trace) == 12 and trace.end_s == pytest.approx(20e-3)
    assert [mark.name for mark in trace.marks()] == ["ProfilerStep#0", "ProfilerStep#1"]

    step, operator, inner, launch, kernel, moved = trace.within(0, 10e-3)
    assert (step.start_s, step.end_s) == (0, pytest.approx(10e-3))
    assert (operator.name, operator.args.external, operator.args.sequence) == ("aten::linear", 1, 0)
    # Of those that begin together the longer is first.
    assert (inner.name, inner.args.external, inner.args.sequence) == ("aten::mm", 2, -1)
    assert launch.args.correlation == kernel.args.correlation == 2
    assert (kernel.name, kernel.process, kernel.thread) == ('gemm<"}, {">', "1344", "7")
    assert (kernel.args.stream, kernel.args.launch_shape) == (7, "[9, 1, 1] []")
    args = moved.args
    assert (args.collective, args.group, args.description) == ("_allgather_base", "17", "mesh_shard")
    assert (args.ranks, args.elements, args.dtype) == ((2, 3), 4096, "BFloat16")
    assert moved.end_s - moved.start_s == pytest.approx(4e-3)


def test_events_alone_or_before_what_stands_beside_them(tmp_path: Path):
    trace = traces.kineto(traces.steps(3))
    expected = everything(read_trace(traces.write(tmp_path, trace)))
    turned = dict(reversed(trace.items()))
    other = read_trace(traces.write(tmp_path, turned))
    assert (everything(other), other.rank) == (expected, 3)
    alone = read_trace(traces.write(tmp_path, trace["traceEvents"]))
    assert everything(alone) == expected
    # Without the list of groups, the events tell of them.
    assert (alone.rank, alone.world_size, alone.base_s) == (-1, 0, 0)
    assert alone.groups == {"17": ("mesh_shard", (2, 3))}


def test_a_list_that_does_not_end_is_read_with_a_note(tmp_path: Path):
    """Chrome's format allows it, for programs that may be killed."""
    text = json.dumps(traces.steps(1)).removesuffix("]")
    trace = read_trace(traces.write(tmp_path, text + ",\n"))
    assert len(trace) == 6
    assert "does not say where it ends" in trace.notes[0]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", ["rank-3.json", "rank-3.json.gz"])
def test_pieces_of_all_sizes_give_the_same_events(tmp_path: Path, indent: int | None, name: str):
    trace = traces.kineto(traces.steps(40), stackFrames={"1": {"name": "}, {" * 999}}, numbers=[1, [], {}] * 999)
    nested: dict[str, Any] = traces.complete("cpu_op", "aten::odd", 3, 4)
    nested["args"]["deep"] = [{"ph": "X", "name": "inside"}, {"ph": "X", "name": "]}, {"}] * 70
    trace["traceEvents"].insert(100, nested)
    path = traces.write(tmp_path, json.dumps(trace, indent=indent), name)
    expected = read_trace(path)
    assert len(expected) == 241
    rng = random.Random(1)
    for size in (1024, 1025, 4096, *(rng.randrange(1024, 60_000) for _ in range(8)), 1 << 24):
        trace_again = read_trace(path, chunk_bytes=size)
        assert everything(trace_again) == everything(expected)
        assert trace_again.marks() == expected.marks()
        assert (trace_again.dropped, trace_again.groups) == (expected.dropped, expected.groups)


def test_a_trace_of_torch_1_8(tmp_path: Path):
    trace = read_trace(traces.write(tmp_path, traces.old_kineto()))
    assert [(e.category, e.name.split()[0]) for e in everything(trace)] == [
        ("user_annotation", "ProfilerStep#2"),
        ("cpu_op", "aten::to"),
        ("cuda_runtime", "cudaMemcpyAsync"),
        ("gpu_memcpy", "Memcpy"),
        ("kernel", "ncclKernel_AllReduce"),
    ]
    _, operator, launch, copy, kernel = everything(trace)
    assert operator.args.external == launch.args.external == copy.args.external == 3981
    assert (copy.args.correlation, copy.args.stream, kernel.thread) == (20002, 7, "stream 9")
    # Its clock is the epoch's.
    assert trace.base_s == pytest.approx(1614800519.473, abs=1e-6)
    assert (trace.rank, trace.groups) == (-1, {})


def test_a_trace_of_jax(tmp_path: Path):
    path = traces.write(tmp_path, traces.xla(), "vm.trace.json.gz")
    trace = read_trace(path)
    assert (trace.producer, trace.base_s) == ("xla", 0)
    assert [(e.process, e.thread, e.category, e.name) for e in everything(trace)] == [
        ("/host:CPU", "python (11)", "", "train"),
        ("/host:CPU", "python (12)", "", "PjitFunction(step)"),
        ("/device:GPU:0", "Stream #5(Compute)", "", "fusion.1"),
    ]
    (step,) = trace.marks()
    assert step.args.step == 4
    operation = everything(trace)[2].args
    assert (operation.hlo, operation.module, operation.correlation) == ("fusion.1", "jit_step", 91)
    assert trace.dropped["python_function"] == 1 and trace.notes == ()
    assert "$train.py:9 step" in [event.name for event in everything(read_trace(path, python=True))]


def test_numbers_and_strings_for_each_other(tmp_path: Path):
    plain = traces.complete("cpu_op", "17", 0, 2, "1", **{"External id": 5, "Process Group Name": "0"})
    turned = plain | {"name": 17, "pid": "1344", "tid": 1, "ts": str(plain["ts"]), "dur": "2000.0"}
    turned["args"] = {"External id": "5", "Process Group Name": 0, "stream": None, "grid": "no list"}
    first, second = everything(read_trace(traces.write(tmp_path, [plain, turned])))
    assert first == second and first.args.external == 5 and first.args.group == "0"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"5": {"pg_desc": "mesh_tp", "ranks": "[1, 3]"}}, {"5": ("mesh_tp", (1, 3))}),
        ({"5": [1, 3]}, {"5": ("", (1, 3))}),
        ([{"pg_name": 5, "ranks": [], "group_size": 4}], {"5": ("", (0, 1, 2, 3))}),
        # Which ranks are left out is not guessed.
        ([{"pg_name": "5", "pg_size": 3, "ranks": "[0, ..., 3]"}], {"5": ("", ())}),
        ("nothing", {}),
        ([None, {"ranks": [1]}, {"pg_name": "5", "ranks": ["x"], "pg_size": -1}], {"5": ("", ())}),
    ],
)
def test_process_groups_in_all_their_forms(tmp_path: Path, config: object, expected: dict[str, Any]):
    world = {"rank": "1", "world_size": "4", "pg_config": config}
    events = [traces.complete("cpu_op", "aten::mm", 0, 1)]
    trace = read_trace(traces.write(tmp_path, traces.kineto(events, distributedInfo=world)))
    assert (trace.rank, trace.world_size, trace.groups) == (1, 4, expected)


def test_events_within_a_stretch(tmp_path: Path):
    """Against looking at each event, with short and long ones, many of which begin together."""
    rng = random.Random(2)
    begins = [rng.randrange(500) for _ in range(5000)]
    lengths = [rng.choice([0, 1, 2, 3, 300 * (rng.random() < 0.01)]) for _ in begins]
    kinds = ("cpu_op", "kernel")
    spans = zip(begins, lengths, strict=True)
    events = [traces.complete(kinds[i % 2], str(i), b, b + n) for i, (b, n) in enumerate(spans)]
    trace = read_trace(traces.write(tmp_path, events))
    known = everything(trace)
    assert len(known) == 5000
    assert [(e.start_s, -e.end_s) for e in known] == sorted((e.start_s, -e.end_s) for e in known)
    for _ in range(100):
        start, end = sorted(rng.uniform(-0.01, 0.9) for _ in range(2))
        expected = [e for e in known if start <= e.start_s < end or e.start_s < start < e.end_s]
        assert trace.within(start, end) == expected
        assert trace.within(start, end, {"kernel"}) == [e for e in expected if e.category == "kernel"]


# --- What is damaged -------------------------------------------------------------------------------------------------


def test_what_profilers_write_that_is_no_json(tmp_path: Path):
    """Paths of Windows, line ends in names, bandwidths without time, bytes of no character set."""
    texts = [json.dumps(event) for event in traces.steps(200)]
    texts[50] = texts[50].replace('"args": {', '"args": {"rate": -nan, "other": [inf, -Infinity], ')
    texts[51] = texts[51].replace('"ph"', '"file": "C:\\users\\Me\\x.py", "ph"')
    texts[52] = texts[52].replace('"ph"', '"text": "one\ntwo\x01", "ph"')
    data = ("[" + ",\n".join(texts) + "]").encode().replace(b"ProfilerStep#150", b"ProfilerStep#\xff")
    trace = read_trace(traces.write(tmp_path, data))
    assert len(trace) == 1200 and trace.notes == ()
    assert trace.marks()[150].name == "ProfilerStep#\ufffd"


def test_a_quotation_mark_in_a_name_costs_that_event_alone(tmp_path: Path):
    """Kineto does not escape them in the names of Python's frames (github.com/pytorch/kineto/pull/1459)."""
    texts = [json.dumps(event) for event in traces.steps(200)]
    texts[700] = texts[700].replace('"name": "', '"name": "a "quoted] ', 1)
    texts[-2] = texts[-2].replace('"name": "', '"name": "{"device": "cpu"}', 1)
    expected = len([text for text in (*texts[:700], *texts[701:-2]) if json.loads(text)["ph"] == "X"])
    path = traces.write(tmp_path, "[" + ",\n".join(texts) + "]")
    trace = read_trace(path, python=True)
    assert len(trace) + trace.dropped["gpu_user_annotation"] == expected + 1
    assert trace.notes == ("2 events of the trace are not JSON: left out.",)
    assert len(read_trace(path, python=True, chunk_bytes=5000)) == len(trace)


def test_events_without_times_that_can_be_meant_are_left_out(tmp_path: Path):
    good = traces.complete("cpu_op", "aten::mm", 0, 1)
    times = [{"ts": "nan"}, {"ts": None}, {"ts": -1e300}, {"ts": [1]}, {"dur": -1}, {"dur": 18446744073709551615}]
    bad = [good | wrong for wrong in (*times, {"dur": "Infinity"})]
    trace = read_trace(traces.write(tmp_path, [*bad, good, 5, None, "x", [good], {"ph": ["X"]}]))
    assert len(trace) == 1 and trace.end_s == pytest.approx(1e-3)
    assert trace.notes == ("7 events of the trace have no time that can be meant: left out.",)


def test_broken_files_are_refused_in_one_line(tmp_path: Path):
    whole = json.dumps(traces.kineto(traces.steps(20)))
    cases = {
        "": "is empty",
        " \n": "is empty",
        "PK\x03\x04": "is not JSON",
        "17": "is not JSON",
        "[]": "holds no events",
        "[1, 2, 3]": "holds no events",
        '{"traceEvents": []}': "holds no events",
        '{"traceEvents": {"ph": "X"}}': "are no list",
        '{"loss": [1, 2], "traceevents": []}': "no profiler trace",
        '{"traceEvents"}': "is not JSON",
        '{"traceEvents": [': "cut short",
        '{"deviceProperties": [{"id"': "cut short",
        whole[:-1]: "cut short",
        whole + whole: "something else follows",
        whole + "\0" * 4096: "something else follows",
        # No event is JSON.
        json.dumps(traces.steps(50)).replace('"ts":', '"ts"'): "are not JSON",
    }
    for text, reason in cases.items():
        assert reason in refused(traces.write(tmp_path, text)).reason, text[:60]
    for cut in random.Random(3).sample(range(1, len(whole)), 40):
        assert "cut short" in refused(traces.write(tmp_path, whole[:cut])).reason, cut
    packed = traces.write(tmp_path, whole, "a.json.gz").read_bytes()
    for cut in (5, 20, len(packed) // 2, len(packed) - 3):
        assert "damaged or cut short" in refused(traces.write(tmp_path, packed[:cut])).reason


def test_what_is_no_file_is_refused_at_once(tmp_path: Path):
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    for path, reason in (
        (tmp_path, "is a folder"),
        (tmp_path / "none.json", "No such file"),
        (pipe, "no regular file"),
        (Path("/dev/zero"), "no regular file"),
        (Path("a\0b"), "null"),
    ):
        assert reason in refused(path).reason


@pytest.mark.parametrize("seed", range(6))
def test_damage_of_any_kind_gives_a_trace_or_a_refusal(tmp_path: Path, seed: int):
    rng = random.Random(seed)
    sources = [json.dumps(traces.kineto(traces.steps(3)), indent=rng.choice([None, 1])), json.dumps(traces.xla())]
    texts = [text.encode() for text in (*sources, traces.old_kineto())]
    for _ in range(150):
        data = traces.damaged(rng, rng.choice(texts))
        name = rng.choice(["a.json", "a.json.gz"])
        path = traces.write(tmp_path, data, name)
        if rng.random() < 0.1:
            path.write_bytes(traces.damaged(rng, path.read_bytes()))
        try:
            trace = read_trace(path, chunk_bytes=rng.choice([1024, 1 << 22]))
        except SettingError:
            continue
        assert len(everything(trace)) == len(trace) > 0
        assert all(0 <= event.start_s <= event.end_s for event in everything(trace))


# --- What is made to do harm -----------------------------------------------------------------------------------------

HOSTILE = {
    "an event of a gigabyte": ("single value", ["[{'ph': 'X', 'name': '"], "x", 1 << 30, []),
    "a string that never ends": ("single value", ["{'a': '"], "\\\\", 400 << 20, []),
    "a name without end": ("single value", ["{'"], "k", 400 << 20, []),
    "a million lists": ("events are not JSON", ["[{'ph': "], "[", 10**6, ["]" * 10**6, "}]"]),
    "a million objects": ("cut short", ["{'traceEvents': [", "{'a':" * 10**6], " ", 1, []),
    "nothing but blanks": ("is empty", [], " ", 400 << 20, []),
    "blanks between events": ("holds no events", ["["], " ", 400 << 20, ["]"]),
    "numbers without end": ("single value", ["["], "1,", 400 << 20, []),
    "a large value that is not used": (
        "holds no events",
        ["{'a': ["],
        "{'b': 1},",
        20 << 20,
        ["1], 'traceEvents': []}"],
    ),
    "a large value, used": ("single value", ["{'distributedInfo': ["], "[],", 400 << 20, []),
    "names without end": ("different names", ["["], "{'ph':'X','ts':1,'name':'%d'},", 90 << 20, ["{}]"]),
    "a world of ranks": (
        "holds no events",
        ["{'distributedInfo': {'world_size': 1e18, 'pg_config': {'0': []}}, 'traceEvents': ["],
        "{},",
        9,
        ["{}]}"],
    ),
}

READ = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]),) * 2)
from meshwright.record.kineto.reading import read_trace
from meshwright.spec import SettingError
try:
    read_trace(Path(sys.argv[1]))
except SettingError as error:
    print(error)
"""


def read_in_little_memory(path: Path) -> str:
    command = [sys.executable, "-c", READ, str(path), str(MEMORY)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", HOSTILE)
def test_memory_is_bounded(tmp_path: Path, name: str):
    reason, before, repeated, size, after = HOSTILE[name]
    path = tmp_path / "hostile.json"
    with path.open("w") as file:
        file.write("".join(before).replace("'", '"'))
        piece = repeated.replace("'", '"')
        if "%d" in piece:
            for number in range(size // len(piece)):
                file.write(piece % number)
        else:
            block = piece * max(1, min(1 << 20, size) // len(piece))
            for _ in range(max(1, size // len(block))):
                file.write(block)
        file.write("".join(after).replace("'", '"'))
    assert reason in read_in_little_memory(path)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path):
    path = tmp_path / "bomb.json.gz"
    with gzip.open(path, "wb", compresslevel=9) as file:
        file.write(b"[")
        for _ in range(150):
            file.write((b'{"ph": "M"},' + b" " * 1000) * 1000)
    assert "unpacks to more than" in read_in_little_memory(path)
