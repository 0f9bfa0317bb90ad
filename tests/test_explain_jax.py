"""Traces of JAX's profiler explained: every device of every file is a rank. No JAX: files made by hand."""

import gzip
import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import pytest
from click.testing import CliRunner
from programs import kineto_trace
from rich.console import Console
from xla_traces import NAMES, Raw, event, gpu_events, host, named, tpu_events

import meshwright as mw
from meshwright.cli.commands import cli
from meshwright.explain import Explanation
from meshwright.explain.traces import traces_in
from meshwright.report.explain import explain_text
from meshwright.report.html import report_html
from meshwright.spec import SettingError


def write(path: Path, events: Sequence[Raw]) -> Path:
    """A file as JAX's profiler names and packs it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(json.dumps({"displayTimeUnit": "ns", "traceEvents": events}).encode()))
    return path


def is_reduction(event: Raw) -> bool:
    """Whether an event is a transfer on a GPU's stream."""
    return event["name"].startswith("all-reduce")


def printed(explanation: Explanation) -> str:
    out = StringIO()
    explain_text(explanation, Console(file=out, width=100))
    return out.getvalue()


def test_every_device_of_a_file_is_a_rank(tmp_path: Path) -> None:
    found = mw.explain(write(tmp_path / "vm.trace.json.gz", gpu_events()))
    assert found.ranks == (0, 1) and found.world_size == 2 and found.missing_ranks == ()
    assert found.step is not None and found.step.closes and found.step.steps == (1, 2)
    assert found.step.account.inefficiency == pytest.approx(0.048)
    assert found.step.account.unseen == pytest.approx(0.012)
    assert found.traces == (str(tmp_path / "vm.trace.json.gz"),)
    text = " ".join(printed(found).split())
    for part in ("JAX profiler on 2 x GPU device · 2 steps of 2 devices in 1 trace", "Instructions by purpose"):
        assert part in text, part
    assert "12% of the step is `unseen`" in " ".join(found.notes) and "meshwright explain TRACE" not in text
    assert "optimizer's update" in " ".join(found.notes)
    assert "Instructions by purpose" in report_html(found)


def test_advice_on_jax_speaks_of_jax(tmp_path: Path) -> None:
    # The host calls late, 22 of 100 ms, and of these 12 in nothing that the trace names.
    found = mw.explain(write(tmp_path / "vm.trace.json.gz", gpu_events()))
    advice = {one.cause: one.what for one in found.advice}
    assert set(advice) == {"input", "launch", "unexplained"}
    assert "jax.device_put" in advice["input"] and "jax.jit" in advice["launch"]
    assert "jax.profiler.TraceAnnotation" in advice["unexplained"]
    assert "torch" not in " ".join(advice.values())


def test_files_of_several_hosts_do_not_collide(tmp_path: Path) -> None:
    # On the second host transfers begin 15 ms later, and stand alone for 5 ms in place of 10.
    late = [{**one, "ts": one["ts"] + 15e3, "dur": 5e3} if is_reduction(one) else one for one in gpu_events()]
    machines = {"node-a": gpu_events(), "node-b": late}
    hosts = [write(tmp_path / f"{name}.trace.json.gz", events) for name, events in machines.items()]
    found = mw.explain(tmp_path)
    assert found.ranks == (0, 1, 2, 3) and found.traces == tuple(map(str, hosts))
    assert "ranks 0, 1 of node-a.trace.json.gz; ranks 2, 3 of node-b.trace.json.gz" in found.notes[0]
    assert found.step is not None and sorted(found.step.ranks) == [0, 1, 2, 3]
    assert "2 steps of 4 devices in 2 traces" in found.ending
    # Nobody is said to wait for a device of another host that merely had the same number there.
    named = mw.explain(tmp_path, purposes={"all-reduce": "replica"})
    assert named.step is not None and named.step.account.straggler == 0
    assert named.step.account.comm_replica == pytest.approx((0.010 + 0.005) / 2)


def test_devices_are_in_the_order_of_their_numbers_without_gaps(tmp_path: Path) -> None:
    later = [dict(event) for event in tpu_events([0, 50, 100])]
    later[0] = {**later[0], "args": {"name": "/device:TPU:2048"}}
    write(tmp_path / "a" / "vm.trace.json.gz", [*NAMES, *later])
    write(tmp_path / "b" / "vm.trace.json.gz", [*NAMES, *tpu_events([0, 50, 100])])
    found = mw.explain([tmp_path / "a", tmp_path / "b"])
    assert found.ranks == (0, 1) and found.missing_ranks == ()
    paths = [str(tmp_path / name / "vm.trace.json.gz") for name in ("b", "a")]
    assert found.traces == tuple(paths)
    assert f"rank 0 of {paths[0]}; rank 1 of {paths[1]}." in found.notes[0]


def test_a_late_batch_of_one_host_is_the_cause_of_what_others_wait_inside_of_the_program(tmp_path: Path) -> None:
    """One host waits 30 ms for its batch, and the other's device as long in the collective."""
    for number, (input_ms, start_ms) in enumerate(((40, 40), (10, 10))):
        raw = [*NAMES, named("process_name", 3, f"/device:TPU:{number}")]
        raw += [named("thread_name", 3, line, tid) for tid, line in {2: "XLA Modules", 3: "XLA Ops"}.items()]
        for step in range(3):
            at = 100.0 * step
            raw += [host("train", at, at + 100, step_num=step), host("input", at, at + input_ms)]
            raw.append(host("TfrtTpuExecute", at + input_ms, at + input_ms, run_id=70 + step))
            raw.append(event("jit_train_step(123)", 3, 2, at + start_ms, at + 100, run_id=70 + step))
            raw.append(event("fusion.4", 3, 3, at + start_ms, at + start_ms + 50, hlo_op="fusion.4"))
            raw.append(event("all-reduce.1", 3, 3, at + start_ms + 50, at + 100, hlo_op="all-reduce.1"))
        write(tmp_path / f"{number}.trace.json.gz", raw)
    for purposes in ({}, {"all-reduce": "replica"}):
        found = mw.explain(tmp_path, purposes=purposes)
        assert found.step is not None and found.step.closes
        first = found.advice[0]
        assert (first.cause, first.gain_s) == ("input", pytest.approx(0.04))
        assert "rank 0" in first.what


def test_the_folders_that_jax_makes_are_searched_from_any_of_them(tmp_path: Path) -> None:
    old, new = (write(tmp_path / "plugins/profile" / day / "vm.trace.json.gz", gpu_events()) for day in ("01", "02"))
    copy = write(new.with_name("perfetto_trace.json.gz"), gpu_events())
    for place in (tmp_path, tmp_path / "plugins", tmp_path / "plugins/profile", new.parent):
        assert [path.resolve() for path in traces_in(place)] == [new], place
    assert traces_in(old.parent) == [old]
    assert mw.explain(tmp_path).name == mw.explain(new).name == tmp_path.name
    new.unlink()
    assert traces_in(tmp_path) == [copy]


def test_a_purpose_is_given_by_name_and_refused_where_it_would_do_nothing(tmp_path: Path) -> None:
    trace = str(write(tmp_path / "vm.trace.json.gz", gpu_events()))
    for name in ("all-reduce", "all-reduce-start.1"):
        done = CliRunner().invoke(cli, ["explain", trace, "--purpose", f"{name}=replica", "--json"])
        assert done.exit_code == 0 and json.loads(done.output)["step"]["account"]["comm.replica"] == pytest.approx(0.01)
    for given, says in (
        ({"all-gather": "shard"}, "--purpose all-gather=shard: names nothing that a trace holds"),
        ({"all-reduce": "data"}, "--purpose all-reduce=data: is no purpose of a transfer"),
        ({"all-reduce": "replicas"}, "nearest that works: --purpose all-reduce=replica"),
    ):
        with pytest.raises(SettingError, match=says):
            mw.explain(trace, purposes=given)


def test_traces_that_cannot_be_taken_together_are_refused(tmp_path: Path) -> None:
    jax_trace = write(tmp_path / "vm.trace.json.gz", gpu_events())
    with pytest.raises(SettingError, match="is given twice"):
        mw.explain([jax_trace, jax_trace])
    other = tmp_path / "rank-0.json"
    other.write_text(json.dumps(kineto_trace(0)))
    with pytest.raises(SettingError, match=r"rank-0.json: is of PyTorch profiler, and .* of JAX profiler"):
        mw.explain([jax_trace, other])
