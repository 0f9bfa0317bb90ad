"""Reading a run back: healthy, unfinished, damaged, hostile."""

import re

import msgspec
import pytest
from synthetic import a_job, a_memory, a_prediction, a_run, a_step, write_metrics, write_rank

from meshwright.account import StepAccount
from meshwright.explain import Explanation, Finding, explain_run
from meshwright.explain.findings import find_in_step
from meshwright.explain.pipeline import predict_idle
from meshwright.explain.run import unprofiled
from meshwright.explain.steps import measure_steps
from meshwright.plan.machine import cpu_cluster
from meshwright.record import (
    Fault,
    LineWriter,
    Metrics,
    RunFolder,
    Span,
    Step,
    create_run,
    start_attempt,
    write_cut_short,
)
from meshwright.spec import DataSettings, Job, Layout, ModelSpec, RunSettings, TraceSettings
from meshwright.spec.decode import encode_job


def said(explanation: Explanation) -> str:
    told = [f"{one.what} {one.evidence}" for one in (*explanation.advice, *explanation.findings)]
    return " ".join([*told, *explanation.notes])


def test_a_healthy_run(tmp_path):
    found = explain_run(a_run(tmp_path / "run"))
    assert found.name == "run" and found.job == a_job()
    assert (found.attempts, found.attempt, found.ending) == (1, 0, "finished")
    assert (found.world_size, found.ranks, found.missing_ranks) == (4, (0, 1, 2, 3), ())
    assert len(found.metrics) == 100 and len(found.evaluations) == 2
    assert found.step_s == pytest.approx(0.25)
    assert found.notes == () and found.faults == ()
    step = found.step
    assert step is not None and step.closes and step.steps == (25, 75)
    assert step.account.total() == pytest.approx(step.wall_s)
    assert step.overlapped == {"shard": pytest.approx(0.015)}
    assert found.difference is not None and found.prediction is not None
    assert found.difference.total() == pytest.approx(found.prediction.step.total() - step.wall_s)
    assert found.memory.rank == 3
    assert found.memory.measured == a_memory(1.3)


def test_it_goes_through_json(tmp_path):
    found = explain_run(a_run(tmp_path / "run", slow=1, by=0.05))
    assert msgspec.json.decode(msgspec.json.encode(found), type=Explanation) == found


def test_a_slow_rank_is_named_with_what_it_costs(tmp_path):
    found = explain_run(a_run(tmp_path / "run", slow=2, by=0.04))
    step = found.step
    assert step is not None
    assert step.blame == {r: {} if r == 2 else {2: pytest.approx(0.04)} for r in range(4)}
    assert step.waited_for() == {2: pytest.approx(0.12)}
    assert step.account.straggler == pytest.approx(0.03)
    assert step.ranks[0].straggler == pytest.approx(0.04) and step.ranks[2].straggler == 0
    assert "Rank 2 is slower than its peers" in said(found) and "40.0 ms" in said(found)
    assert "off on straggler" not in said(found)


# The smaller: nobody waits 5% of the step for any one rank, and yet all of them together cost twice that.
@pytest.mark.parametrize("by", [0.08, 0.04])
def test_ranks_that_are_late_in_turn_are_not_accused_one_by_one(tmp_path, by):
    folder = a_run(tmp_path / "run", ranks=())
    measured = [a_step(step, slow=slow, by=by) for step, slow in ((25, 0), (50, 1), (75, 2), (100, 3))]
    for rank in range(4):
        write_rank(folder, 0, rank, steps=range(1, 101), measured=[step[rank] for step in measured])
    found = explain_run(folder)
    assert "Ranks are late in turn" in said(found) and "ranks 0, 1, 2, 3" in said(found)
    assert "slower than its peers" not in said(found)


def test_profiled_steps_unlike_the_others_are_noted(tmp_path):
    found = explain_run(a_run(tmp_path / "run", slow=2, by=0.04))
    assert "Profiled steps took 285 ms, the others 250 ms" in said(found)


def test_even_ranks_blame_nobody(tmp_path):
    found = explain_run(a_run(tmp_path / "run"))
    assert "slower than its peers" not in said(found)


def test_the_run_account_adds_up_to_what_was_paid(tmp_path):
    found = explain_run(a_run(tmp_path / "run"))
    life = found.life.account
    assert life.total() == pytest.approx(4 * (3 + 1 + 25 + 0.5 + 0.5 + 0.1))
    assert life.steps.total() == pytest.approx(4 * 25)
    assert (life.startup, life.evaluation, life.checkpoint, life.measurement, life.idle) == pytest.approx(
        (12, 4, 2, 2, 0.4)
    )
    assert found.step is not None
    assert life.steps.share("comm.shard") == pytest.approx(found.step.account.share("comm.shard"))
    assert found.life.yield_ == pytest.approx(life.steps.useful / life.total())
    assert found.life.statistical_efficiency == "not measurable here"


def test_steps_that_a_later_attempt_ran_again_are_lost(tmp_path):
    job = a_job(shard=2)
    folder = create_run(tmp_path / "run", encode_job(job))
    first = start_attempt(folder, a_prediction(job))
    write_metrics(folder, range(1, 61))
    for rank in range(2):
        write_rank(folder, first, rank, steps=range(1, 61), how=None)
    writer = LineWriter(folder.events(first, 1))
    writer.append(Fault(step=60, time_s=30.0, what="loss is NaN"))
    second = start_attempt(folder, a_prediction(job))
    write_metrics(folder, range(41, 101), attempt=1)
    for rank in range(2):
        write_rank(folder, second, rank, steps=range(41, 101), begin_s=500.0)
    found = explain_run(folder)
    assert found.attempts == 2 and found.attempt == 1
    assert found.life.account.lost_work == pytest.approx(2 * 20 * 0.25)
    assert found.life.account.steps.total() == pytest.approx(2 * 100 * 0.25)
    assert found.life.account.startup == pytest.approx(12)
    assert [line.step for line in found.metrics] == list(range(1, 101))
    (fault,) = found.faults
    assert (fault.attempt, fault.rank, fault.step, fault.what) == (0, 1, 60, "loss is NaN")


def test_spans_that_overlap_are_counted_once(tmp_path):
    folder = a_run(tmp_path / "run", ranks=())
    writer = LineWriter(folder.events(0, 0))
    writer.append(Span(name="startup", start_s=0.0, end_s=2.0))
    writer.append(Span(name="step", start_s=2.0, end_s=12.0, step=10, count=10))
    writer.append(Span(name="checkpoint", start_s=5.0, end_s=6.0, step=5))
    writer.append(Span(name="compile", start_s=1.5, end_s=3.0, step=1))
    writer.append(Span(name="nap", start_s=12.0, end_s=13.0))
    life = explain_run(folder).life.account
    assert life.total() == pytest.approx(13)
    assert (life.startup, life.compile, life.checkpoint, life.idle) == pytest.approx((1.5, 1.5, 1, 1))
    assert life.steps.total() == pytest.approx(8)


def test_without_profiled_steps_it_says_so_and_still_knows_the_useful_part(tmp_path):
    found = explain_run(a_run(tmp_path / "run", profiled=()))
    assert found.step is None and found.difference is None
    assert "No step was profiled" in said(found)
    assert found.life.yield_ == pytest.approx(0.4 * 25 / 30.1)
    assert found.life.account.steps.other == pytest.approx(0.6 * 100)


def test_without_a_known_peak_there_is_no_yield(tmp_path):
    found = explain_run(a_run(tmp_path / "run", peak=0.0, profiled=()))
    assert found.life.yield_ is None


def test_a_run_still_being_written(tmp_path):
    job = a_job()
    folder = create_run(tmp_path / "run", encode_job(job))
    found = explain_run(folder)
    assert found.attempt is None and found.ending == "has not started"
    assert "nothing to explain" in said(found)
    start_attempt(folder, a_prediction(job))
    found = explain_run(folder)
    assert found.missing_ranks == (0, 1, 2, 3)
    write_metrics(folder, range(1, 31))
    measured = [a_step(25), a_step(29)]
    for rank in range(4):
        # Rank 3 has not written the second profiled step yet.
        ready = [step[rank] for step in measured][: 1 if rank == 3 else 2]
        write_rank(folder, 0, rank, steps=range(1, 31), measured=ready, how=None)
    found = explain_run(folder)
    assert found.step is not None and found.step.steps == (25,)
    assert found.ending.startswith("still running")
    write_cut_short(folder, 0, 137)
    assert explain_run(folder).ending.startswith("cut short")


def test_a_missing_rank_is_named(tmp_path):
    found = explain_run(a_run(tmp_path / "run", ranks=(0, 1, 3)))
    assert found.missing_ranks == (2,)
    assert "No events from rank 2" in said(found)
    assert found.ending == "finished; no end from rank 2"
    assert found.step is not None and list(found.step.ranks) == [0, 1, 3]


def test_a_rank_without_a_profiled_step_is_named(tmp_path):
    folder = a_run(tmp_path / "run", ranks=(0, 1, 2))
    write_rank(folder, 0, 3, steps=range(1, 101))
    found = explain_run(folder)
    assert found.step is not None and list(found.step.ranks) == [0, 1, 2]
    assert "No profiled step from rank 3" in said(found)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_truncated_files_lose_only_what_was_in_them(tmp_path, keep):
    folder = a_run(tmp_path / "run")
    for path in (folder.job, folder.metrics, folder.plan(0), *(folder.events(0, rank) for rank in range(4))):
        path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    found = explain_run(folder)
    assert "plan.json is missing or cannot be read" in said(found)
    assert "The job cannot be read back" in said(found)
    assert found.attempt == 0


def test_an_account_that_does_not_close_is_called_poor(tmp_path):
    steps = [
        msgspec.structs.replace(one, account=one.account + StepAccount(inefficiency=-0.03, other=0.03))
        if one.rank == 1
        else one
        for one in a_step(5)
    ]
    measured = measure_steps({one.rank: [Step(measured=one)] for one in steps})
    assert measured is not None and not measured.closes
    assert measured.poor_rank == 1 and measured.poor_share == pytest.approx(0.03 / 0.245, rel=0.05)
    folder = a_run(tmp_path / "run", ranks=())
    for one in steps:
        write_rank(folder, 0, one.rank, steps=range(1, 11), measured=[one])
    assert "does not close" in said(explain_run(folder)) and "rank 1" in said(explain_run(folder))


def findings_of(account: StepAccount) -> str:
    return " ".join(finding.what for finding in findings_in(account))


def evidence_of(account: StepAccount) -> str:
    return " ".join(finding.evidence for finding in findings_in(account))


def findings_in(account: StepAccount) -> list[Finding]:
    steps = [msgspec.structs.replace(one, account=account, transfers=()) for one in a_step(5)]
    measured = measure_steps({one.rank: [Step(measured=one)] for one in steps})
    assert measured is not None
    return find_in_step(measured, a_prediction(a_job()))


def test_findings_name_the_cause():
    assert "goes to host" in findings_of(StepAccount(useful=0.7, host=0.3))
    # What cannot be seen is no loss.
    assert "goes to input" in findings_of(StepAccount(useful=0.1, unseen=0.7, input=0.1))
    text = findings_of(StepAccount(useful=0.10, inefficiency=0.09, optimizer=0.01, comm_shard=0.2))
    assert "goes to comm.shard" in text and "off on comm.shard: it predicted 40.0 ms, measured 200 ms" in text
    assert "Too low by 80% of the measured time" in evidence_of(StepAccount(useful=0.1, comm_shard=0.2))
    assert "Too high by 233% of the measured time" in evidence_of(StepAccount(useful=0.03, comm_shard=0.2))
    # A share of next to nothing is no figure.
    for useful in (0.0, 1e-6):
        found = evidence_of(StepAccount(useful=useful, comm_shard=0.2))
        assert re.search(r"Too high by 100(\.0)? ms of each step \(50%\)", found)
    assert "inefficiency" not in findings_of(StepAccount(inefficiency=0.9, comm_shard=0.1)).split("The plan")[0]


def test_memory_above_the_plan_is_a_finding(tmp_path):
    folder = a_run(tmp_path / "run", ranks=(0, 1, 2))
    write_rank(folder, 0, 3, steps=range(1, 101), memory=a_memory(10.0))
    assert "Memory is above the plan, most of it in activations" in said(explain_run(folder))


def test_a_loss_that_stops_being_a_number_is_a_finding(tmp_path):
    folder = a_run(tmp_path / "run")
    writer = LineWriter(folder.metrics)
    line = explain_run(folder).metrics[-1]
    writer.append(msgspec.structs.replace(line, step=100, loss=float("nan")))
    assert "not a finite number from step 100 on" in said(explain_run(folder))


def test_the_first_step_of_an_attempt_does_not_set_the_step_time(tmp_path):
    folder = a_run(tmp_path / "run", ranks=())
    folder.metrics.unlink()
    writer = LineWriter(folder.metrics)
    for step, seconds in ((1, 9.0), (2, 0.2), (3, 0.3), (4, 0.2)):
        writer.append(
            Metrics(
                step=step,
                attempt=0,
                time_s=0.0,
                loss=1.0,
                gradient_norm=1.0,
                learning_rate=0.1,
                step_s=seconds,
                tokens_per_s=1.0,
                mfu=None,
                memory_bytes=0.0,
            )
        )
    assert explain_run(folder).step_s == pytest.approx(0.2)


def test_explaining_writes_nothing(tmp_path):
    folder = a_run(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in sorted(folder.path.rglob("*"))}
    explain_run(RunFolder(folder.path))
    assert {path: path.stat().st_mtime_ns for path in sorted(folder.path.rglob("*"))} == before


def test_a_run_too_short_to_be_profiled_says_what_would_profile_it():
    job = msgspec.structs.replace(a_job(), trace=TraceSettings(every_steps=50))
    assert unprofiled(8, job) == "8 steps were run, and one in 50 is profiled: --set trace.every_steps=4"
    for steps in (2, 60):
        assert unprofiled(steps, job) == "trace.every_steps sets how often one is"


def test_a_stage_that_computes_its_blocks_again_is_expected_to_take_longer() -> None:
    """recompute = 4 of 8: the first blocks, and with them the first rank, whose passes are so much longer."""
    model = ModelSpec(layers=8, d_model=1024, heads=16, kv_heads=4, head_dim=64, feed_forward=4096, vocabulary=8)
    job = Job(
        run=RunSettings(name="test", steps=1),
        model=model,
        data=DataSettings(sequence=128, global_batch=4),
        layout=Layout(pipeline=2, recompute=4, stage_layers=(4, 4)),
        cluster=cpu_cluster(2),
    )
    first, last = predict_idle(job).busy
    assert first / last == pytest.approx(4 / 3, rel=0.05)
