"""The verbs from Python."""

import subprocess
import sys
from pathlib import Path

import pytest

import meshwright as mw
from meshwright.spec import SettingError


def test_verbs_stay_callable_when_their_packages_are_imported() -> None:
    program = """
import sys
import meshwright as mw
job = mw.read_job("examples/quickstart.toml", ["cluster.processes=2"])
import meshwright.plan, meshwright.explain, meshwright.train
assert mw.plan(job).job.layout.shard == 2
assert mw.plan.build_plan(job).job == mw.plan(job).job
assert callable(mw.explain) and callable(mw.train)
assert "torch" not in sys.modules
"""
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, cwd=root)


def test_a_bad_setting_is_one_line() -> None:
    with pytest.raises(SettingError, match=r"run\.stps: no such setting; nearest that works: run\.steps"):
        mw.read_job("examples/quickstart.toml", ["run.stps=1"])


def test_explaining_no_run(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="holds no job"):
        mw.explain(tmp_path)


def test_train_plan_and_explain_a_small_job(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number in range(20):
        (tmp_path / "text" / f"{number}.txt").write_text("to be or not to be " * 20)
    settings = {
        "run.name": "small",
        "run.folder": tmp_path / "runs",
        "run.steps": 3,
        "model.layers": 1,
        "data.path": tmp_path / "text",
        "data.cache": tmp_path / "tokens",
        "data.sequence": 32,
        "data.global_batch": 4,
        "layout.microbatch": 2,
        "cluster.processes": 2,
        "evaluation.sequences": 2,
    }
    job = mw.read_job("examples/quickstart.toml", [f"{key}={value}" for key, value in settings.items()])
    run = mw.train(job)
    assert run == tmp_path / "runs" / "small"
    explanation = mw.explain(run)
    assert explanation.prediction == mw.plan(job).job
    assert [line.step for line in explanation.metrics] == [0, 1, 2]
    with pytest.raises(SettingError, match="exists already"):
        mw.train(job)
