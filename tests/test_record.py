"""The run folder: what a writer leaves is what a reader finds, whatever happened in between."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest
from synthetic import a_job, a_prediction

from meshwright.record import (
    Ended,
    Evaluation,
    LineWriter,
    Metrics,
    RunFolder,
    Span,
    create_run,
    open_run,
    read_events,
    read_lines,
    read_metrics,
    read_prediction,
    replace_text,
    start_attempt,
)
from meshwright.spec import SettingError
from meshwright.spec.decode import encode_job


def a_span(step: int) -> Span:
    return Span(name="step", start_s=float(step), end_s=step + 1.0, step=step)


def a_line(step: int, loss: float | None = 1.0, attempt: int = 0) -> Metrics:
    return Metrics(
        step=step,
        attempt=attempt,
        time_s=0.0,
        loss=loss,
        gradient_norm=1.0,
        learning_rate=1e-3,
        step_s=0.1,
        tokens_per_s=1.0,
        mfu=None,
        memory_bytes=1.0,
    )


def write(path: Path, *lines: msgspec.Struct) -> None:
    writer = LineWriter(path)
    for line in lines:
        writer.append(line)
    writer.close()


def test_lines_come_back_in_order(tmp_path):
    path = tmp_path / "deep" / "rank-0.jsonl"
    write(path, *(a_span(step) for step in range(5)))
    assert [line.step for line in read_lines(path, Span)] == [0, 1, 2, 3, 4]
    assert list(read_lines(tmp_path / "none.jsonl", Span)) == []


def test_half_a_last_line_is_left_out_and_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "rank-0.jsonl"
    write(path, a_span(0), a_span(1))
    whole = path.read_bytes()
    for cut in range(len(whole) // 2 + 1, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert [line.step for line in read_lines(path, Span)] == [0]
        write(path, a_span(2))
        assert [line.step for line in read_lines(path, Span)] == [0, 2]


def test_lines_that_cannot_be_read_are_left_out(tmp_path):
    path = tmp_path / "attempts" / "0" / "events" / "rank-0.jsonl"
    write(path, a_span(0))
    with path.open("ab") as file:
        file.write(b'{"event":"aura","colour":"blue"}\n')  # a kind of a newer version
        file.write(b'{"event":"span","name":"step","start_s":null,"end_s":1}\n\n\x00\xff\xfe\n[1,2]\n')
        file.write(b'{"event":"ended","x":' + b"[" * 100_000 + b"\n")
    write(path, Ended(step=0, time_s=2.0, how="finished"))
    (line, end) = read_events(RunFolder(tmp_path), 0)[0]
    assert isinstance(line, Span) and isinstance(end, Ended)


def test_a_newer_field_does_not_hide_a_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"event":"span","name":"step","start_s":0,"end_s":1,"mood":"fine"}\n')
    assert [line.name for line in read_lines(path, Span)] == ["step"]


def test_metrics_of_a_step_run_again_replace_the_first_and_keep_order(tmp_path):
    folder = RunFolder(tmp_path)
    write(folder.metrics, a_line(1, 3.0), a_line(2, 2.0), Evaluation(step=2, attempt=0, time_s=0.0, held_out_loss=2.5))
    write(folder.metrics, a_line(2, 1.9, attempt=1), a_line(3, 1.5, attempt=1))
    steps, evaluations = read_metrics(folder)
    assert [(line.step, line.loss, line.attempt) for line in steps] == [(1, 3.0, 0), (2, 1.9, 1), (3, 1.5, 1)]
    assert [line.held_out_loss for line in evaluations] == [2.5]


def test_a_loss_that_is_not_a_number_keeps_its_line(tmp_path):
    folder = RunFolder(tmp_path)
    write(folder.metrics, a_line(1, float("nan")), a_line(2, float("inf")))
    assert [line.loss for line in read_metrics(folder)[0]] == [None, None]


def test_many_processes_write_their_own_files(tmp_path):
    program = """
import sys
from pathlib import Path
from meshwright.record import LineWriter, RunFolder, Span
rank = int(sys.argv[2])
writer = LineWriter(RunFolder(Path(sys.argv[1])).events(0, rank))
for step in range(200):
    writer.append(Span(name="step", start_s=rank, end_s=rank + 1, step=step))
writer.close()
"""
    workers = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path), str(rank)]) for rank in range(4)]
    assert [worker.wait() for worker in workers] == [0, 0, 0, 0]
    events = read_events(RunFolder(tmp_path), 0)
    assert list(events) == [0, 1, 2, 3]
    for rank, lines in events.items():
        assert [(line.step, line.start_s) for line in lines if isinstance(line, Span)] == [
            (step, rank) for step in range(200)
        ]


def test_two_writers_of_one_file_never_mix_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writers = [LineWriter(path), LineWriter(path)]
    threads = [
        threading.Thread(target=lambda w=writer, n=number: [w.append(a_span(n * 1000 + i)) for i in range(300)])
        for number, writer in enumerate(writers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for writer in writers:
        writer.close()
    found = [line.step for line in read_lines(path, Span)]
    assert sorted(found) == [*range(300), *range(1000, 1300)]


def test_a_reader_beside_a_writer_sees_whole_lines_only(tmp_path):
    path = tmp_path / "rank-0.jsonl"
    stop = threading.Event()

    def keep_writing() -> None:
        writer = LineWriter(path)
        step = 0
        while not stop.is_set():
            writer.append(a_span(step))
            step += 1
        writer.close()

    thread = threading.Thread(target=keep_writing)
    thread.start()
    try:
        seen = 0
        until = time.monotonic() + 0.3
        while time.monotonic() < until:
            steps = [line.step for line in read_lines(path, Span)]
            assert steps == list(range(len(steps)))
            assert len(steps) >= seen
            seen = len(steps)
    finally:
        stop.set()
        thread.join()
    assert seen > 0


def test_a_full_disk_keeps_lines_until_there_is_room(tmp_path, monkeypatch):
    path = tmp_path / "rank-0.jsonl"
    room = 100
    real = os.write

    def write_while_room(file: int, data: bytes) -> int:
        nonlocal room
        if room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real(file, data[:room])
        room -= written
        return written

    monkeypatch.setattr(os, "write", write_while_room)
    writer = LineWriter(path)
    for step in range(5):
        writer.append(a_span(step))
    assert [line.step for line in read_lines(path, Span)] == [0], "100 bytes hold one line and a half"
    room = 10_000
    writer.append(a_span(5))
    assert [line.step for line in read_lines(path, Span)] == [0, 1, 2, 3, 4, 5]
    room = 0
    writer.append(a_span(6))
    room = 10_000
    writer.close()
    assert [line.step for line in read_lines(path, Span)] == [0, 1, 2, 3, 4, 5, 6], "close tries once more"


def test_the_operating_systems_own_limit_stops_no_run(tmp_path):
    program = """
import resource, sys
from pathlib import Path
from meshwright.record import LineWriter, Span
writer = LineWriter(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))
for step in range(20):
    writer.append(Span(name="step", start_s=0.0, end_s=1.0, step=step))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
writer.close()
"""
    path = tmp_path / "rank-0.jsonl"
    subprocess.run([sys.executable, "-c", program, str(path)], check=True)
    assert [line.step for line in read_lines(path, Span)] == list(range(20))


def test_other_write_errors_are_not_swallowed(tmp_path, monkeypatch):
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    writer = LineWriter(tmp_path / "rank-0.jsonl")
    monkeypatch.setattr(os, "write", broken)
    with pytest.raises(OSError, match="Input/output"):
        writer.append(a_span(0))


def test_a_killed_writer_leaves_whole_lines(tmp_path):
    program = """
import sys
from pathlib import Path
from meshwright.record import LineWriter, Span
writer = LineWriter(Path(sys.argv[1]))
step = 0
while True:
    writer.append(Span(name="step", start_s=0.0, end_s=1.0, step=step))
    step += 1
"""
    path = tmp_path / "rank-0.jsonl"
    worker = subprocess.Popen([sys.executable, "-c", program, str(path)])
    until = time.monotonic() + 30
    while time.monotonic() < until and not (path.is_file() and path.stat().st_size > 1000):
        time.sleep(0.01)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    steps = [line.step for line in read_lines(path, Span)]
    assert steps == list(range(len(steps))) and len(steps) > 5


def test_a_run_is_never_overwritten(tmp_path):
    create_run(tmp_path / "run", "x = 1\n")
    with pytest.raises(SettingError, match="never overwritten") as caught:
        create_run(tmp_path / "run", "x = 2\n")
    assert "run.name=run-2" in caught.value.nearest
    assert (tmp_path / "run" / "job.toml").read_text() == "x = 1\n"


def test_a_run_that_cannot_be_made_leaves_nothing_behind(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match="cannot be made"):
        create_run(tmp_path / "file" / "run", "x = 1\n")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SettingError, match="No space left"):
            create_run(tmp_path / "run", "x = 1\n")
    assert not (tmp_path / "run").exists()
    create_run(tmp_path / "run", "x = 1\n")


def test_opening_what_is_no_run_names_one_that_is(tmp_path):
    def refused(path: Path) -> tuple[str, str]:
        with pytest.raises(SettingError) as caught:
            open_run(path)
        return caught.value.reason, caught.value.nearest

    runs = tmp_path / "runs"
    for name in ("good", "tiny"):
        start_attempt(create_run(runs / name, "x = 1\n"), a_prediction(a_job()))
    # Where somebody keeps a job file of their own.
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "job.toml").write_text("x = 1\n")
    assert refused(runs / "god") == ("does not exist", str(runs / "good"))
    assert refused(runs) == ("holds no job.toml and no program.json", f"{runs / 'good'}, {runs / 'tiny'}")
    assert refused(tmp_path / "mine") == ("does not exist", "a folder that meshwright train made")
    assert open_run(runs / "good").path == runs / "good"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    replace_text(path, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            replace_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_attempts_are_numbered_and_strange_names_are_passed_over(tmp_path):
    job = a_job()
    folder = create_run(tmp_path / "run", encode_job(job))
    assert folder.attempt_numbers() == []
    assert [start_attempt(folder, a_prediction(job)) for _ in range(3)] == [0, 1, 2]
    for name in ("notes", "²", ".3"):
        (folder.attempts / name).mkdir()
    for name in ("rank-x.jsonl", "rank-².jsonl", "rank-.jsonl", "rank-1.jsonl.partial"):
        (folder.attempt(2) / "events" / name).write_text("{}\n")
    write(folder.events(2, 10), a_span(0))
    write(folder.events(2, 9), a_span(0))
    assert folder.attempt_numbers() == [0, 1, 2]
    assert list(read_events(folder, 2)) == [9, 10]


def test_a_prediction_comes_back_or_is_none(tmp_path):
    job = a_job()
    folder = create_run(tmp_path / "run", encode_job(job))
    number = start_attempt(folder, a_prediction(job))
    assert read_prediction(folder, number) == a_prediction(job)
    folder.plan(number).write_bytes(folder.plan(number).read_bytes()[:100])
    assert read_prediction(folder, number) is None
    assert read_prediction(folder, 7) is None


def test_steps_that_a_later_attempt_did_again_are_no_part_of_the_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    writer = LineWriter(folder.metrics)

    def step(number: int, attempt: int) -> Metrics:
        return Metrics(
            step=number,
            attempt=attempt,
            time_s=0.0,
            loss=1.0,
            gradient_norm=1.0,
            learning_rate=1.0,
            step_s=1.0,
            tokens_per_s=1.0,
            mfu=None,
            memory_bytes=1.0,
        )

    for number in range(8):
        writer.append(step(number, 0))
    writer.append(Evaluation(step=7, attempt=0, time_s=0.0, held_out_loss=1.0))
    for number in range(5, 7):
        writer.append(step(number, 1))
    writer.append(Evaluation(step=5, attempt=1, time_s=0.0, held_out_loss=2.0))
    writer.close()
    metrics, evaluations = read_metrics(folder)
    assert [(line.step, line.attempt) for line in metrics] == [*((n, 0) for n in range(5)), (5, 1), (6, 1)]
    assert [line.step for line in evaluations] == [5]
