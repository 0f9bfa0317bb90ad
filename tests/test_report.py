"""An explanation as text, as JSON and as a page."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import msgspec
import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs
from rich.console import Console
from synthetic import a_run, a_step, write_metrics

from meshwright.account import MEANINGS, MemoryAccount, RunAccount
from meshwright.explain import Explanation, explain_run
from meshwright.explain.steps import measure_steps
from meshwright.plan import build_plan, predict
from meshwright.record import Fault, LineWriter, Step, create_run
from meshwright.report.charts import DRAWN_RANKS, drawn_ranks, thinned
from meshwright.report.colours import COLOURS
from meshwright.report.explain import explain_json, explain_text, rank_table
from meshwright.report.html import report_html, write_report
from meshwright.report.plan import plan_text
from meshwright.report.words import MEMORY_MEANINGS, RUN_MEANINGS
from meshwright.spec.decode import planning_job

HOSTILE = '<script>alert("x")</script>&\'"\x1b[31m\u202e</pre>'


def printed(explanation: Explanation, width: int = 100) -> str:
    out = StringIO()
    explain_text(explanation, Console(file=out, width=width))
    return out.getvalue()


def without_plotly(page: str) -> str:
    assert page.count(get_plotlyjs()) == 1, "plotly.js is in the page once"
    return page.replace(get_plotlyjs(), "")


def figures_of(page: str) -> dict[str, dict]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_text_says_what_the_run_was_and_where_its_time_went(tmp_path):
    text = printed(explain_run(a_run(tmp_path / "run", slow=2, by=0.04)))
    for part in (
        "run · shard 4, zero 3, microbatch 1 · 4 x toy",
        "loss 5.500 -> 2.172 nats in 100 steps",
        "held-out 5.550 -> 2.216",
        "250 ms predicted",
        "comm.shard",
        "straggler",
        "Rank 2 is slower than its peers",
        "26.2%",
        "not measurable",
    ):
        assert part in text, part
    assert "recompute" not in text, "zero rows are left out"
    assert "\x1b" not in text, "no colours where there is no terminal"
    assert max(len(line) for line in text.splitlines()) <= 100


def test_ranks_are_listed_only_where_they_differ(tmp_path):
    assert "Ranks, ms a step" in printed(explain_run(a_run(tmp_path / "one", slow=2, by=0.04)))
    assert "Ranks, ms a step" not in printed(explain_run(a_run(tmp_path / "two")))


def test_a_column_says_what_it_is(tmp_path):
    explanation = explain_run(a_run(tmp_path / "run", slow=2, by=0.04))
    assert explanation.step is not None
    ranks = {
        rank: msgspec.structs.replace(account, bubble=0.0301 * rank, other=0.0007)
        for rank, account in explanation.step.ranks.items()
    }
    step = msgspec.structs.replace(explanation.step, ranks=ranks)
    table = rank_table(step)
    cells = {str(column.header): list(column.cells) for column in table.columns}
    assert cells["bubble"] == ["0.0", "30.1", "60.2", "90.3"]
    assert cells["other"] == ["0.7"] * 4
    assert "imbalance" not in cells, "no rank has any"


def test_a_node_of_many_devices_is_called_one():
    plan = build_plan(planning_job(model="gpt2-124m", gpus="1xh100", sequence=512, global_batch=8))
    large = msgspec.structs.replace(plan, cluster=msgspec.structs.replace(plan.cluster, devices_per_node=64))
    out = StringIO()
    plan_text(large, Console(file=out, width=100))
    assert "gpt2-124m on 1 node of 64 x h100" in out.getvalue()


def test_the_text_of_an_empty_run_is_plain(tmp_path):
    text = printed(explain_run(create_run(tmp_path / "run", "")))
    assert "has not started" in text and "nothing to explain" in text


def test_without_a_peak_compute_is_not_called_inefficient(tmp_path):
    explanation = explain_run(a_run(tmp_path / "run", peak=0.0))
    assert explanation.step is not None and explanation.prediction is not None
    account = msgspec.structs.replace(explanation.step.account, useful=0.0, inefficiency=0.18)
    guess = msgspec.structs.replace(explanation.prediction.step, useful=0.0)
    explanation = msgspec.structs.replace(
        explanation,
        step=msgspec.structs.replace(explanation.step, account=account),
        prediction=msgspec.structs.replace(explanation.prediction, step=guess),
    )
    assert re.search(r"^compute +forward and backward", printed(explanation), re.MULTILINE)


def test_json_is_the_whole_explanation(tmp_path):
    explanation = explain_run(a_run(tmp_path / "run"))
    assert msgspec.json.decode(explain_json(explanation), type=Explanation) == explanation
    assert json.loads(explain_json(explanation))["life"]["yield"] == pytest.approx(explanation.life.yield_)


def test_hostile_text_neither_steers_a_terminal_nor_opens_a_tag(tmp_path):
    folder = a_run(tmp_path / "run")
    explanation = explain_run(folder)
    writer = LineWriter(folder.events(0, 1))
    writer.append(Fault(step=3, time_s=1.0, what=HOSTILE + "[bold]"))
    explanation = msgspec.structs.replace(
        explain_run(folder), name=HOSTILE, path=HOSTILE, job_toml=f"name = {HOSTILE}\n", notes=(HOSTILE,)
    )
    text = printed(explanation)
    assert "\x1b" not in text and "\u202e" not in text
    assert "[bold]" in text, "markup is printed, not obeyed"
    page = without_plotly(report_html(explanation))
    assert "alert(" in page and "<script>alert" not in page
    assert page.count("<script") == 3 and page.count("</pre>") == 1
    assert "&lt;script&gt;" in page


def test_the_page_needs_no_network(tmp_path):
    page = without_plotly(report_html(explain_run(a_run(tmp_path / "run", slow=2, by=0.04))))
    assert not re.search(r"https?://|@import|url\(", page)
    assert not re.search(r"<(link|img|iframe|object|embed|base)\b", page)
    assert not re.search(r"<script[^>]+src", page)
    assert "default-src 'none'" in page


class Balance(HTMLParser):
    """Every tag that opens closes, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_its_figures_are_plotlys(tmp_path):
    folder = a_run(tmp_path / "run", slow=2, by=0.04)
    write_report(explain_run(folder), folder.report)
    page = folder.report.read_text(encoding="utf-8")
    assert [path.name for path in folder.path.iterdir() if path.name.startswith(".")] == []
    balance = Balance()
    balance.feed(without_plotly(page))
    assert balance.open == []
    figures = figures_of(page)
    assert set(figures) == {"loss", "step", "ranks", "memory", "run"}
    for name, figure in figures.items():
        go.Figure(figure)
        assert f'id="{name}"' in page
        assert figure["layout"]["xaxis"]["title"]["text"]
    assert len(figures["loss"]["data"][0]["x"]) == 100
    # Both curves end at the steps that are done.
    assert figures["loss"]["data"][0]["x"][-1] == max(figures["loss"]["data"][1]["x"])


def test_the_bars_are_the_account(tmp_path):
    explanation = explain_run(a_run(tmp_path / "run", slow=2, by=0.04))
    assert explanation.step is not None and explanation.prediction is not None
    figure = figures_of(report_html(explanation))["step"]
    totals = [sum(trace["x"][i] for trace in figure["data"]) for i in range(2)]
    assert figure["data"][0]["y"] == ["predicted", "measured"]
    assert totals == pytest.approx([1e3 * explanation.prediction.step.total(), 1e3 * explanation.step.wall_s])
    ranks = figures_of(report_html(explanation))["ranks"]
    for i, account in enumerate(explanation.step.ranks.values()):
        assert sum(trace["x"][i] for trace in ranks["data"]) == pytest.approx(1e3 * account.total())


def test_pages_without_numbers_say_so(tmp_path):
    folder = create_run(tmp_path / "run", "")
    page = report_html(explain_run(folder))
    assert "nothing to explain" in page and "No step has been recorded yet" in page
    assert "plotly" not in page.lower(), "nothing to draw, so nothing to draw with"
    write_metrics(folder, range(1, 5))
    assert set(figures_of(report_html(explain_run(folder)))) == {"loss"}


def test_every_word_has_a_colour_and_a_meaning():
    words = {*MEANINGS, *MEMORY_MEANINGS, *RUN_MEANINGS}
    assert words <= COLOURS.keys()
    assert set(MEMORY_MEANINGS) == {name for name, _ in MemoryAccount().rows()}
    assert {name for name, _ in RunAccount().rows()} <= set(RUN_MEANINGS)
    step = [COLOURS[name] for name in MEANINGS]
    assert len(set(step)) == len(step)


def test_a_long_curve_is_thinned_and_a_loss_that_is_no_number_leaves_a_gap(tmp_path):
    folder = a_run(tmp_path / "run")
    line = explain_run(folder).metrics[0]
    lines = [msgspec.structs.replace(line, step=n - 1, loss=float(n)) for n in range(1, 10_001)]
    points = thinned(lines)
    assert len(points) <= 1500 and points[-1][0] == 10_000
    assert points[0][1] == pytest.approx(4.0), "the mean of steps 1 to 7"
    assert thinned([msgspec.structs.replace(line, loss=None)]) == [(line.step + 1, None)]
    assert thinned([]) == []


def test_of_many_ranks_the_interesting_ones_are_drawn():
    steps = a_step(5, world=64, slow=50, by=0.1)
    step = measure_steps({one.rank: [Step(measured=one)] for one in steps})
    assert step is not None
    drawn = drawn_ranks(step)
    assert len(drawn) == DRAWN_RANKS and 50 in drawn and drawn == sorted(drawn)


def test_the_docs_define_every_word():
    text = (Path(__file__).parents[1] / "docs" / "accounts.md").read_text()
    step, run, memory = re.split(r"^## The (?:run|memory) account$", text, flags=re.MULTILINE)
    for words, chapter in (
        (MEANINGS, step),
        ([name for name, _ in RunAccount().rows()], run),
        (MEMORY_MEANINGS, memory),
    ):
        assert re.findall(r"^\| `([\w.]+)` \|", chapter, re.MULTILINE)[: len(words)] == list(words)


def test_importing_loads_nothing_that_draws():
    program = (
        "import sys; import meshwright.explain, meshwright.report.explain, meshwright.report.html;"
        "print(*({'rich', 'plotly', 'torch', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""


def test_a_pipeline_is_drawn_rank_by_time(tmp_path):
    explanation = explain_run(a_run(tmp_path / "run"))
    assert "The pipeline" not in report_html(explanation)
    job = planning_job(
        model="llama3-8b",
        gpus="8xh100",
        sequence=8192,
        global_batch=16,
        settings=("layout.shard=2", "layout.pipeline=4", "layout.schedule=interleaved", "layout.stages_per_rank=2"),
    )
    explanation = msgspec.structs.replace(explanation, prediction=predict(job))
    page = report_html(explanation)
    figure = figures_of(page)["pipeline"]
    go.Figure(figure)
    assert [trace["name"] for trace in figure["data"]] == ["forward", "backward"]
    # 8 microbatches through 2 stages on each of 4 ranks.
    assert [len(trace["x"]) for trace in figure["data"]] == [64, 64]
    assert set(figure["data"][0]["y"]) == {f"rank {rank}" for rank in range(4)}
    assert "interleaved; blocks on each rank: 4+4" in page
    # A rank's two stages are told apart, and what the numbers are is said.
    opacity = dict(zip(figure["data"][0]["customdata"], figure["data"][0]["marker"]["opacity"], strict=True))
    assert all((opacity[stage] < 1) == (stage >= 4) for stage in range(8))
    assert "numbers are microbatches" in page and "stages are paler" in page
