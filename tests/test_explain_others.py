"""Programs of other trainers: their runs, and their traces."""

import gzip
import json
from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path

import msgspec
import pytest
from programs import DETAIL, PROGRAM, a_pipeline_step, a_program_run, a_trace, kineto_trace
from rich.console import Console
from synthetic import a_run, a_step

import meshwright as mw
from meshwright.explain import Explanation, explain_run
from meshwright.explain.details import mean_detail
from meshwright.explain.reading import RankTrace, Told
from meshwright.explain.steps import measure_steps
from meshwright.explain.traces import Useful, explain_traces, traces_in
from meshwright.explain.words import kernel_text
from meshwright.record import Fault, LineWriter, Step
from meshwright.report.charts import stacked
from meshwright.report.explain import explain_json, explain_text
from meshwright.report.html import report_html
from meshwright.spec import SettingError


def printed(explanation: Explanation) -> str:
    out = StringIO()
    explain_text(explanation, Console(file=out, width=100))
    return out.getvalue()


# --- Runs -----------------------------------------------------------------------------------------------------------


def test_a_run_of_another_trainer_has_no_job_and_no_plan_and_nobody_misses_them(tmp_path: Path) -> None:
    found = explain_run(a_program_run(tmp_path / "run"))
    assert (found.job, found.prediction, found.program) == (None, None, PROGRAM)
    assert (found.world_size, found.missing_ranks, found.name) == (4, (), "my-run")
    assert found.notes == ()
    assert found.step is not None and found.step.closes
    assert found.life.account.steps.total() == pytest.approx(100)
    text = printed(found)
    for part in (
        "Run my-run · Hugging Face Trainer 5.17 on 4 x NVIDIA H200 · 1.24 B parameters · finished",
        "loss 5.500 -> 4.500 nats in 100 steps, 3.28 M tokens",
        "131,072 tokens/s, MFU 40.0%",
        "matrix products",
        "mesh_fsdp",
        "aten::item",
    ):
        assert part in " ".join(text.split()), part
    assert "not finite" not in text and "predicted" not in text.replace("predicted  measured", "")
    assert msgspec.json.decode(explain_json(found), type=Explanation) == found


def test_its_page_has_the_program_and_what_its_steps_tell(tmp_path: Path) -> None:
    page = report_html(explain_run(a_program_run(tmp_path / "run", slow=0.04)))
    for part in ("The program", "What to change", "Process groups", "Longest idle gaps", "Kernels by purpose", "H200"):
        assert part in page, part
    assert page.index("What to change") < page.index("What stands out") < page.index("Where a step")
    assert "vectorized_elementwise_kernel" in page and "CUDAFunctor" not in page


def test_names_from_a_program_neither_steer_a_terminal_nor_open_a_tag(tmp_path: Path) -> None:
    hostile = "[bold]<script>alert(1)\x1b[31m\u202e"
    found = explain_run(a_program_run(tmp_path / "run", program=msgspec.structs.replace(PROGRAM, trainer=hostile)))
    assert found.detail is not None
    gap = msgspec.structs.replace(found.detail.gaps[0], bucket=hostile, seconds=0.1, doing=hostile, before=hostile)
    advice = (msgspec.structs.replace(found.advice[0], cause=hostile, what=hostile, evidence=hostile),)
    found = msgspec.structs.replace(
        found, advice=advice, detail=msgspec.structs.replace(found.detail, gaps=(gap,), groups=())
    )
    text, page = printed(found), report_html(found)
    assert "\x1b" not in text and "\u202e" not in text and "[bold]" in text
    assert "alert(1)" in page and "<script>alert(1)" not in page


def test_a_loss_that_nobody_told_is_not_called_broken(tmp_path: Path) -> None:
    found = explain_run(a_program_run(tmp_path / "run", losses=()))
    assert not any("finite" in finding.what for finding in found.findings)
    assert "Learned  100 steps, 3.28 M tokens" in printed(found)
    assert "No loss was recorded" in report_html(found)


def test_what_the_program_does_not_know_is_said(tmp_path: Path) -> None:
    bare = msgspec.structs.replace(
        PROGRAM, flops_per_step=None, flops_from="not counted: compiled", parameters=None, tokens_per_step=None
    )
    found = explain_run(a_program_run(tmp_path / "run", program=bare))
    assert "model FLOPs not counted: compiled" in " ".join(found.notes)
    text = printed(found)
    assert "tokens" not in text and "MFU" not in text
    report_html(found)


def test_faults_of_recording_are_shown(tmp_path: Path) -> None:
    folder = a_program_run(tmp_path / "run")
    writer = LineWriter(folder.events(0, 1))
    writer.append(Fault(step=25, time_s=9.0, what="the profiler is busy, so step 25 was not sampled"))
    assert "Fault    attempt 0, rank 1, step 25: the profiler is busy" in printed(explain_run(folder))


def test_damaged_and_absurd_programs_are_explained_as_far_as_they_go(tmp_path: Path) -> None:
    folder = a_program_run(tmp_path / "one")
    folder.program.write_bytes(folder.program.read_bytes()[:40])
    found = explain_run(folder)
    assert "program.json cannot be read" in found.notes[0] and found.step is not None
    for world_size in (-3, 0, 10**12):
        absurd = msgspec.structs.replace(PROGRAM, world_size=world_size)
        assert explain_run(a_program_run(tmp_path / f"{world_size}", program=absurd)).world_size == 4


def test_what_a_compiled_program_hides_is_a_note_and_no_loss(tmp_path: Path) -> None:
    folder = a_program_run(tmp_path / "run")
    for rank in range(4):
        path = folder.events(0, rank)
        text = path.read_text().replace('"unseen":', '"shown":').replace('"inefficiency":', '"unseen":')
        path.write_text(text.replace('"shown":', '"inefficiency":'))
    found = explain_run(folder)
    assert "inside a compiled program" in " ".join(found.notes)
    assert "unseen" not in " ".join(finding.what for finding in found.findings)


def test_the_waits_of_an_unknown_pipeline_are_divided_by_how_busy_ranks_were() -> None:
    steps = a_pipeline_step((0.10, 0.06))
    measured = measure_steps({one.rank: [Step(measured=one)] for one in steps})
    assert measured is not None
    first, second = measured.ranks[0], measured.ranks[1]
    assert first.imbalance == 0 and second.imbalance == pytest.approx(0.04)
    # The one computes while the other waits.
    assert first.bubble == pytest.approx(0.06) and second.bubble == pytest.approx(0.10 - 0.04)
    assert measured.blame == {0: {}, 1: {}} and measured.account.straggler == pytest.approx(0.0, abs=1e-9)
    assert measured.account.total() == pytest.approx(measured.wall_s)


def test_details_are_means_and_the_longest_gaps_of_all() -> None:
    more = msgspec.structs.replace(DETAIL, host={"collect": 0.01}, groups=(), launches=1400, kernel_s=190e-6)
    both = mean_detail([DETAIL, more])
    assert both is not None
    assert both.host == pytest.approx({"launch": 0.0005, "synchronize": 0.0025, "collect": 0.005})
    assert both.groups[0].count == 33 and both.groups[0].sent_bytes == pytest.approx(1.2e9)
    assert both.launches == 2000 and both.kernel_s == pytest.approx((2600 * 90e-6 + 1400 * 190e-6) / 4000)
    assert [gap.seconds for gap in both.gaps] == [0.004, 0.002]
    assert mean_detail([]) is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<float, 4>(float*, int)", "CatArrayBatchedCopy"),
        (
            "void cutlass::Kernel2<cutlass_80_simt_sgemm_128x64>(Params)",
            "cutlass_80_simt_sgemm_128x64",
        ),
        ("aten::item", "aten::item"),
        ("(anonymous)", "(anonymous)"),
        ("", ""),
        ("k" * 200, "k" * 33 + "..."),
    ],
)
def test_kernels_are_called_by_what_tells_them_apart(name: str, text: str) -> None:
    assert kernel_text(name) == text


# --- Traces -----------------------------------------------------------------------------------------------------------


def reader(*traces: RankTrace) -> Callable[[Path, Told], tuple[RankTrace, ...]]:
    by_path = {trace.path: trace for trace in traces}
    return lambda path, told: (by_path[path],)


def explained(*traces: RankTrace) -> Explanation:
    return explain_traces([trace.path for trace in traces], read=reader(*traces))


def test_traces_of_all_ranks_are_one_account() -> None:
    slow = [[Step(measured=a_step(step, slow=1, by=0.05)[rank]) for step in (7, 8)] for rank in range(4)]
    found = explained(*(a_trace(Path(f"t/rank-{rank}.json"), steps=slow[rank], world_size=4) for rank in range(4)))
    assert found.ranks == (0, 1, 2, 3) and found.step is not None and found.step.steps == (7, 8)
    assert found.step.blame[0] == {1: pytest.approx(0.05)}
    assert {advice.cause: advice.gain_s for advice in found.advice}["straggler"] == pytest.approx(0.05)
    assert "--flops-per-step" in " ".join(found.notes)
    text = printed(found)
    assert "2 steps of 4 traces" in text and "Yield" not in text and "Learned" not in text
    page = report_html(found)
    assert "Loss" not in page.partition("<script")[0] and "Process groups" not in page


def test_of_one_trace_waiting_stays_transfer() -> None:
    found = explained(a_trace(Path("t/trace.json"), world_size=4))
    assert found.missing_ranks == (1, 2, 3) and "No trace of ranks 1, 2, 3" in found.notes[0]
    assert found.step is not None and found.step.account.straggler == 0


@pytest.mark.parametrize(
    ("said", "names", "ranks"),
    [
        ((1, 0), ("a.json", "b.json"), {"b.json": 0, "a.json": 1}),
        ((-1, -1), ("rank-1.json.gz", "rank-0.json.gz"), {"rank-0.json.gz": 0, "rank-1.json.gz": 1}),
        ((-1, -1), ("node_12.1700.pt.trace.json", "node_34.1701.pt.trace.json"), None),
        ((1, -1), ("a.json", "b.json"), {"b.json": 0, "a.json": 1}),
        ((-1, -1), ("out7_rank1.json", "out7_rank0.json"), {"out7_rank0.json": 0, "out7_rank1.json": 1}),
    ],
)
def test_a_trace_is_of_the_rank_that_it_says_or_is_named_after(
    said: Sequence[int], names: Sequence[str], ranks: dict[str, int] | None
) -> None:
    found = explained(*(a_trace(Path("t") / name, rank=rank) for name, rank in zip(names, said, strict=True)))
    order = {Path(path).name: rank for rank, path in zip(found.ranks, found.traces, strict=True)}
    assert order == (ranks or {name: number for number, name in enumerate(names)})
    assert any("by the order given" in note for note in found.notes) == (-1 in said and "rank" not in names[0])


@pytest.mark.parametrize(
    ("traces", "says"),
    [
        ([("a.json", 1, 2), ("b.json", 1, 2)], "t/b.json: is of rank 1, as t/a.json is; "),
        ([("rank-3.json", -1, 0), ("b.json", 3, 0)], "t/b.json: is of rank 3, as t/rank-3.json is; "),
        ([("a.json", 0, 2), ("b.json", 1, 4)], "t/b.json: is of a program of 4 ranks, and t/a.json of one of 2; "),
        ([("a.json", 0, 2), ("b.json", 5, 2)], "t/b.json: is of rank 5 of a program of 2 ranks; "),
    ],
)
def test_traces_that_cannot_be_of_one_program_are_refused(traces: list[tuple[str, int, int]], says: str) -> None:
    own = [Step(measured=a_step(7)[0])]
    with pytest.raises(SettingError) as refused:
        explained(*(a_trace(Path("t") / name, rank=rank, world_size=world, steps=own) for name, rank, world in traces))
    assert str(refused.value).startswith(says)


def test_an_absurd_world_counts_nobody_as_missing() -> None:
    assert explained(a_trace(Path("t/a.json"), rank=0, world_size=10**12)).missing_ranks == ()


def test_traces_of_different_steps_have_no_account_together() -> None:
    lines = [[Step(measured=a_step(step)[rank])] for rank, step in ((0, 7), (1, 9))]
    found = explained(*(a_trace(Path(f"t/rank-{rank}.json"), steps=lines[rank]) for rank in range(2)))
    assert found.step is None and found.advice == ()
    assert "profile the same steps" in " ".join(found.notes)
    printed(found)
    report_html(found)
    with pytest.raises(SettingError, match="holds no whole step"):
        explained(a_trace(Path("t/a.json"), steps=()))


def test_what_is_useful_is_known_where_it_is_told() -> None:
    seen: list[float] = []

    def read(path: Path, told: Told) -> tuple[RankTrace]:
        seen.append(told.useful_s)
        return (a_trace(path),)

    useful = Useful(flops_per_step=989.4e12 * 0.1, gpu="h200")
    found = explain_traces([Path("t/a.json")], useful, read=read)
    assert seen == [pytest.approx(0.1)] and found.program is not None and found.program.device == "h200"
    assert not any("useful" in note for note in found.notes)
    for wrong, says in (("h201", "nearest that works: --gpu h200"), ("h200", "must be above 0")):
        with pytest.raises(SettingError, match=says):
            explain_traces([Path("t/a.json")], Useful(flops_per_step=-1.0, gpu=wrong), read=read)


# --- Paths ------------------------------------------------------------------------------------------------------------


def write_trace(path: Path, text: str = '{"schemaVersion": 1, "traceEvents": []}') -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_a_folder_of_traces_is_told_from_other_json(tmp_path: Path) -> None:
    traces = [write_trace(tmp_path / f"rank-{rank}.json.gz") for rank in (0, 2, 10)]
    write_trace(tmp_path / "step-times.json", "[0.1, 0.2]")
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(b'{"traceEvents": []}')[:12])
    (tmp_path / "folder.json").mkdir()
    assert traces_in(tmp_path) == traces
    assert traces_in(tmp_path / "folder.json") == []
    old, new = (write_trace(tmp_path / "jax/plugins/profile" / day / "host.trace.json.gz") for day in ("01", "02"))
    assert old != new and traces_in(tmp_path / "jax") == [new]


def test_runs_and_traces_are_not_mixed(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    trace = write_trace(tmp_path / "trace.json")
    with pytest.raises(SettingError, match="is a run, which is explained alone"):
        mw.explain([trace, run.path])
    with pytest.raises(SettingError, match="is for traces"):
        mw.explain(run.path, flops_per_step=1e14, gpu="h100")
    for flops, gpu in ((None, "h100"), (1e14, None)):
        with pytest.raises(SettingError, match="is lacking"):
            mw.explain(trace, flops_per_step=flops, gpu=gpu)
    with pytest.raises(SettingError, match="takes a run folder or traces"):
        mw.explain([])
    assert mw.explain(str(run.path)).name == "run" and mw.explain([run.path]).name == "run"
    assert mw.explain(a_program_run(tmp_path / "other").path).program == PROGRAM


@pytest.mark.parametrize("text", ["", "[]", "{", "[1, 2", '{"traceEvents": 3}', '{"traceEvents": [7]}', "{}", "\x00"])
@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_what_is_no_trace_is_refused_in_a_line(tmp_path: Path, name: str, text: str) -> None:
    path = write_trace(tmp_path / name, text)
    with pytest.raises(SettingError) as refused:
        mw.explain(path)
    assert str(refused.value).startswith(str(path)) and "\n" not in str(refused.value)
    with pytest.raises(SettingError, match="does not exist"):
        mw.explain([path, tmp_path / "gone.json"])


def test_a_trace_of_a_gpu_is_told_from_one_of_a_cpu(tmp_path: Path) -> None:
    found = mw.explain(write_trace(tmp_path / "rank-0.json", json.dumps(kineto_trace(0))))
    assert found.program is not None and found.program.kind == "cuda"
    assert "Kernels by purpose" in printed(found)


def test_a_bar_begins_at_zero_whatever_rounding_leaves() -> None:
    figure = stacked({"useful": [80.0], "inefficiency": [-3.0], "other": [-2e-14]}, ["rank 0"], "ms")
    assert [trace["x"] for trace in figure["data"]] == [[80.0], [-3.0], [0.0]]


def test_words_of_the_account_are_set_apart_in_a_note_and_nothing_else_is_markup(tmp_path: Path) -> None:
    found = explain_run(a_program_run(tmp_path / "run"))
    page = report_html(msgspec.structs.replace(found, notes=("it is `bubble` <b>`<i>`</b>",)))
    assert "it is <code>bubble</code> &lt;b&gt;<code>&lt;i&gt;</code>&lt;/b&gt;" in page


def test_json_of_traces_names_the_files() -> None:
    found = explained(a_trace(Path("t/rank-0.json")))
    assert json.loads(explain_json(found))["traces"] == ["t/rank-0.json"]
