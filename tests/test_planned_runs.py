"""What benchmarks/planned_runs.py makes of runs whose figures are known."""

import pytest

from benchmarks.planned_runs import Ran, figures
from meshwright.plan import predict
from meshwright.spec.decode import planning_job


def a_run(microbatch: int, slower: float, *, fuller: float = 1.0, sequence: int = 4096) -> Ran:
    """A run that took so many times what is predicted."""
    settings = (f"layout.microbatch={microbatch}",)
    job = planning_job(model="llama-1b-untied", gpus="1xh200", sequence=sequence, global_batch=8, settings=settings)
    predicted = predict(job)
    memory = predicted.memory.scaled(fuller)
    return Ran(f"{microbatch}", job, predicted.step_s * slower, None, memory, predicted)


def test_errors_and_the_first_choice() -> None:
    # Predicted in this order; measured, microbatch 4 is the fastest.
    runs = [a_run(8, 1.25), a_run(4, 1.0), a_run(2, 1.1, fuller=0.8)]
    found = figures(runs)
    assert found["step, median error"] == pytest.approx(1 - 1 / 1.1)
    assert found["step, worst error"] == pytest.approx(0.2)
    assert found["memory, worst error"] == pytest.approx(0.25)
    assert found["first choice, slower than the best"] == pytest.approx(runs[0].step_s / runs[1].step_s - 1)


def test_runs_of_other_jobs_are_not_compared() -> None:
    found = figures([a_run(8, 1.25), a_run(4, 1.0, sequence=2048)])
    assert "first choice, slower than the best" not in found
    assert found["step, worst error"] == pytest.approx(0.2)
