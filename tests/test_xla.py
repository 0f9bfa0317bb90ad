"""Traces of JAX's profiler made by hand, with every moment known: of GPUs and TPUs."""

from typing import Any

import pytest
from xla_traces import HOST, NAMES, gpu_trace, host, tpu_events, xla_trace

from meshwright.account import Purpose
from meshwright.record import HostCause
from meshwright.record.kineto.trace import Trace
from meshwright.record.kineto.xla import measure_xla_trace
from meshwright.spec import SettingError


def shares(trace: Trace, **options: Any) -> list[dict[str, float]]:
    """Milliseconds by bucket of every step of device 0, what is zero left out; the account must close."""
    steps = measure_xla_trace(trace, **options).devices[0]
    for one in steps:
        assert one.measured.account.closes(one.measured.wall_s)
    rows = [one.measured.account.rows() for one in steps]
    return [{name: round(seconds * 1e3, 6) for name, seconds in row if abs(seconds) > 1e-12} for row in rows]


def test_a_gpu_step_is_divided_by_what_its_streams_show():
    expected = {"inefficiency": 48.0, "input": 18.0, "host": 22.0, "unseen": 12.0}
    assert shares(gpu_trace()) == [expected, expected]
    found = measure_xla_trace(gpu_trace())
    assert list(found.devices) == [0, 1]
    assert [one.measured.step for one in found.devices[1]] == [1, 2]
    assert [one.measured.rank for one in measure_xla_trace(gpu_trace(), first_rank=4).devices[1]] == [5, 5]


def test_a_collective_has_the_purpose_that_the_user_gives_it():
    (note,) = measure_xla_trace(gpu_trace()).notes
    assert "10.0% is exposed collectives" in note and "all-reduce 10.0%" in note
    tables: list[dict[str, Purpose]] = [
        {"all-reduce": "replica"},
        {"all-reduce": "shard", "all-reduce-start.1": "replica"},
    ]
    for purposes in tables:
        first, _ = shares(gpu_trace(), purposes=purposes)
        assert (first["comm.replica"], first["unseen"]) == (10.0, 2.0)
        found = measure_xla_trace(gpu_trace(), purposes=purposes)
        assert found.notes == ()
        one = found.devices[0][0]
        assert one.measured.overlapped == {"replica": pytest.approx(0.01)}
        assert one.detail is not None
        (group,) = one.detail.groups
        assert (group.purpose, group.count) == ("replica", 1)
        assert group.exposed_s == pytest.approx(0.01) and group.overlapped_s == pytest.approx(0.01)


def test_the_detail_names_kernels_gaps_and_what_the_host_did():
    detail = measure_xla_trace(gpu_trace()).devices[0][0].detail
    assert detail is not None
    kernels = {group.purpose: (round(group.seconds * 1e3, 6), group.count) for group in detail.kernels}
    assert kernels == {"matrix products": (20, 1), "fused and other": (28, 2), "communication": (20, 1)}
    # Of 22 ms without work and without a batch to wait for, 10 ms in calling the program.
    host: dict[HostCause, float] = {cause: round(seconds * 1e3, 6) for cause, seconds in detail.host.items()}
    assert host == {"launch": 10, "python": 12}
    assert [(round(gap.seconds * 1e3, 6), gap.bucket) for gap in detail.gaps[:2]] == [(20, "host"), (18, "input")]
    assert detail.gaps[1].doing == "input" and detail.gaps[1].before == "gemm_fusion_dot.1_kernel"
    assert detail.launches == 4
    assert detail.kernel_s == pytest.approx(0.016)


def test_useful_seconds_are_taken_out_of_compute():
    first, _ = shares(gpu_trace(), useful_s=0.03)
    assert (first["useful"], first["inefficiency"]) == (30.0, 18.0)


def test_steps_nobody_marks_are_calls_of_the_main_program():
    found = measure_xla_trace(gpu_trace(marked=False))
    assert [one.measured.step for one in found.devices[0]] == [1, 2]
    assert any("each call of train_step counts as one" in note for note in found.notes)
    assert shares(gpu_trace(marked=False)) == shares(gpu_trace())


def test_waiting_nobody_annotates_counts_as_host_and_a_note_says_so():
    raw = [*NAMES, *tpu_events([0, 50], with_input=False)]
    found = measure_xla_trace(xla_trace(raw))
    assert any("counts as `host`" in note for note in found.notes)
    assert shares(xla_trace(raw))[0]["host"] == 32


def test_a_tpu_step_is_found_by_its_execution():
    found = measure_xla_trace(xla_trace([*NAMES, *tpu_events([0, 50, 100])]))
    (devices,) = found.devices.values()
    assert [one.measured.step for one in devices] == [1, 2]
    for number, one in enumerate(devices):
        # From the end of one execution to the end of the next.
        assert (one.measured.start_s, one.measured.end_s) == pytest.approx(
            (0.078 + 0.05 * number, 0.128 + 0.05 * number)
        )
    first, _ = shares(xla_trace([*NAMES, *tpu_events([0, 50, 100])]), purposes={"all-gather": "shard"})
    assert first == {"inefficiency": 13.0, "comm.shard": 4.0, "input": 5.0, "host": 27.0, "unseen": 1.0}


def test_saves_have_their_bucket():
    raw = [*NAMES, *tpu_events([0, 50]), host("save checkpoint", 85, 105)]
    assert shares(xla_trace(raw))[0]["checkpoint"] == 20


def test_one_step_alone_is_kept():
    found = measure_xla_trace(xla_trace([*NAMES, *tpu_events([0])]))
    assert [one.measured.step for one in found.devices[0]] == [0]


def test_a_trace_without_marks_or_calls_is_one_step():
    raw = [one for one in [*NAMES, *tpu_events([0, 50])] if one["ph"] == "M" or one["pid"] != HOST]
    found = measure_xla_trace(xla_trace(raw))
    assert len(found.devices[0]) == 1
    assert any("all of it counts as one" in note for note in found.notes)


def test_a_trace_in_which_no_device_works_is_refused():
    with pytest.raises(SettingError, match=r"made by hand.*: shows nothing that a device did; nearest"):
        measure_xla_trace(xla_trace([*NAMES, host("train", 0, 10, step_num=0)]))
