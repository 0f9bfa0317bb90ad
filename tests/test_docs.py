"""The documentation against the program: keys, defaults, limits, bytes, commands and links."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
import torch
from click.testing import CliRunner
from jobs import cpu_cluster, tiny_job
from pages import anchors
from ranks import run_ranks
from torch.distributed.fsdp import FSDPModule

from meshwright.account import MemoryAccount
from meshwright.cli import cli
from meshwright.models import token_loss
from meshwright.parallel import begin_microbatch, build_mesh, build_parallel_model, start_distributed
from meshwright.plan import predict_memory
from meshwright.plan.activations import BYTES
from meshwright.plan.part import build_part
from meshwright.spec import FAMILIES, ZOO, Job, SettingError, count_flops, count_parameters
from meshwright.spec.decode import decode_job, planning_job, read_job
from meshwright.spec.huggingface import FORMATS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())

JOB_PAGE = (ROOT / "docs" / "job.md").read_text()
LAYOUT_COLUMNS = {
    "zero 3": ("layout.zero=3",),
    "zero 2": ("layout.zero=2",),
    "zero 1": ("layout.zero=1",),
    "replica alone": ("layout.shard=1", "layout.replica=8"),
}


def rows(page: str, first_header: str | None = None) -> Iterator[dict[str, str]]:
    """Each row of the page's tables by column; only of the table whose first column has that header, if given."""
    header: list[str] | None = None
    for line in page.splitlines():
        if not line.startswith("|"):
            header = None
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if header is None:
            header = cells
        elif not set(line) <= set("|-: ") and first_header in (None, header[0]):
            yield dict(zip(header, cells, strict=True))


def layout_table(first_header: str) -> dict[str, dict[str, str]]:
    page = (ROOT / "docs" / "layouts.md").read_text()
    table = {row.pop(first_header): row for row in rows(page, first_header)}
    assert table and all(list(row) == list(LAYOUT_COLUMNS) for row in table.values())
    return table


# --- The job file ----------------------------------------------------------------------------------------------------


def fields(kind: type[msgspec.Struct], prefix: str = "") -> Iterator[tuple[str, msgspec.structs.FieldInfo]]:
    """Every key under a type, nested ones by their whole name."""
    for field in msgspec.structs.fields(kind):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            yield from fields(field.type, f"{prefix}{field.encode_name}.")
        else:
            yield f"{prefix}{field.encode_name}", field


KEYS = {row["key"].strip("`"): row for row in rows(JOB_PAGE, "key")}
FIELDS = dict(fields(Job))
# What a job file may leave out although the resolved job must hold it, or may say instead of it.
RESOLVED = {
    "model.kv_heads": "`model.heads`",
    "model.head_dim": "`model.d_model` / `model.heads`",
    "layout.precision": '`"auto"`',
    "trainer.name": '`"meshwright"`',
    "trainer.source": "the name's",
}
SHORTHANDS = {"cluster.gpus", "cluster.processes", "cluster.intra", "cluster.inter", "model.config"}


def test_the_job_page_has_every_key_and_no_other() -> None:
    assert set(KEYS) == set(FIELDS) | SHORTHANDS


@pytest.mark.parametrize("key", FIELDS)
def test_the_job_page_gives_the_default(key: str) -> None:
    shown, default = KEYS[key]["default"], FIELDS[key].default
    if key in RESOLVED:
        assert shown == RESOLVED[key]
    elif default is msgspec.NODEFAULT:
        assert shown == "required"
    elif default is None:
        assert shown == "none"
    else:
        assert msgspec.json.decode(shown.strip("`"), type=type(default)) == default


def small_job(key: str, value: Any) -> Job:
    """A job that is right but for `key`."""
    cluster = msgspec.to_builtins(cpu_cluster(1))
    table: dict[str, Any] = {
        "run": {"name": "page", "steps": 1},
        "model": {"layers": 1, "d_model": 8, "heads": 2, "head_dim": 4, "feed_forward": 8, "vocabulary": 257},
        "data": {"sequence": 8, "global_batch": 4},
        "cluster": cluster if key not in SHORTHANDS else {},
    }
    *sections, name = key.split(".")
    inner = table
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[name] = value
    return decode_job(table, local=cpu_cluster)


def limits(must_be: str) -> list[tuple[float, float]]:
    """Each limit in "at least A" or "A to B", with a value just outside it."""
    if least := re.match(r"at least (\d+)", must_be):
        return [(int(least[1]), int(least[1]) - 1)]
    if between := re.match(r"(\d[\de-]*) to ([\d.]+)", must_be):
        low, high = float(between[1]), float(between[2])
        return [(low, low - (low or 1e-7) / 2), (high, high + 1e-7)]
    return []


@pytest.mark.parametrize("key", [key for key, row in KEYS.items() if limits(row["must be"])])
def test_limits_on_the_job_page_are_the_checks(key: str) -> None:
    def set_key(value: float) -> None:
        small_job(key, [value, 0.5] if key == "optimizer.betas" else value)

    for limit, outside in limits(KEYS[key]["must be"]):
        set_key(limit)
        with pytest.raises(SettingError) as refused:
            set_key(outside)
        assert refused.value.setting.startswith(key)


# --- Layouts ---------------------------------------------------------------------------------------------------------


def predicted(*settings: str) -> tuple[Job, MemoryAccount]:
    """The example of docs/layouts.md: two microbatches on each of 8 GPUs."""
    job = planning_job(model="llama3-8b", gpus="8xh200", sequence=8192, global_batch=16, settings=settings)
    return job, predict_memory(job)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("column", LAYOUT_COLUMNS)
def test_bytes_per_parameter_are_the_plans(column: str, precision: str) -> None:
    def cell(row: str, column: str = column) -> float:
        """Bytes of the whole model; what is a few blocks' is the same in zero 3, which the test compares with."""
        words = table[row][column]
        if not words[0].isdigit():
            return 0.0
        numerator, _, parts = words.partition(" / ")
        return float(numerator) / (job.layout.shard if parts else 1) * whole

    table = layout_table("bytes per parameter")
    job, memory = predicted(*LAYOUT_COLUMNS[column], f"layout.precision={precision}")
    _, lean = predicted(*LAYOUT_COLUMNS["zero 3"], f"layout.precision={precision}")
    whole = count_parameters(job.model)
    # Exact: 8 divides every dimension of this model.
    assert memory.parameters == cell("parameters, fp32")
    assert memory.gradients == cell("gradients, fp32")
    assert memory.optimizer_states == cell("AdamW's two moments, fp32") + 4 * build_part(job).tensors
    copies, waiting = f"whole parameters, in {precision}", "whole gradients, fp32, if microbatches accumulate"
    # Beside the table's bytes there are the blocks at work: two of 32, output layer, embedding and a gather's buffer.
    extra = memory.communication_buffers - cell(copies) - cell(waiting)
    assert abs(extra - lean.communication_buffers) < 0.3 * BYTES[job.layout.precision] * whole


def test_the_example_is_the_plans() -> None:
    for row, cells in layout_table("GB on each rank").items():
        for column, shown in cells.items():
            account = dict(predicted(*LAYOUT_COLUMNS[column])[1].rows())
            assert f"{account[row.replace(' ', '_')] / 1e9:.1f}" == shown, (row, column)


def test_recomputed_activations_are_the_plans() -> None:
    page = (ROOT / "docs" / "layouts.md").read_text()
    table = list(rows(page, "GB of activations"))
    assert [row["GB of activations"] for row in table] == ["none", "selective", "16", "full"]
    for row in table:
        recompute = row.pop("GB of activations")
        for column, shown in row.items():
            tensor = int(column.removeprefix("tensor "))
            settings = (f"layout.shard={8 // tensor}", f"layout.tensor={tensor}", f"layout.recompute={recompute}")
            assert f"{predicted(*settings)[1].activations / 1e9:.1f}" == shown, (recompute, column)


def held_whole(model: torch.nn.Module) -> tuple[float, float]:
    """Parameters (elements) of gathered copies and of unreduced gradients that FSDP holds now."""
    groups = {id(g): g for m in model.modules() if isinstance(m, FSDPModule) and (g := fsdp_group(m)) is not None}
    copies = gradients = 0
    for parameter in (parameter for group in groups.values() for parameter in group.fsdp_params):
        copies += sum(tensor.untyped_storage().nbytes() // tensor.itemsize for tensor in parameter.all_gather_outputs)
        waiting = parameter.unsharded_accumulated_grad
        if waiting is None and parameter._unsharded_param is not None:
            waiting = parameter._unsharded_param.grad
        gradients += waiting.numel() if waiting is not None else 0
    return copies, gradients


def fsdp_group(module: FSDPModule) -> Any:
    """The parameters that FSDP gathers together with `module`. There is no public way to ask what is gathered."""
    return module._get_fsdp_state()._fsdp_param_group


def watch_microbatches(job: Job) -> list[tuple[float, float]]:
    """What is held whole after each pass of a step of two microbatches; first, of the output layer and in all."""
    device = start_distributed(job.cluster)
    model = build_parallel_model(job, build_mesh(job.layout, device), device)
    (part,) = model.parts.values()
    ends = sum(p.numel() for module in (part.norm, part.head) if module is not None for p in module.parameters())
    seen: list[tuple[float, float]] = [(ends, sum(parameter.numel() for parameter in model.parameters()))]
    tokens = torch.zeros(1, job.data.sequence, dtype=torch.int64)
    for last in (False, True):
        begin_microbatch(part, job.layout, last=last)
        loss = token_loss(part(tokens), tokens)
        seen.append(held_whole(part))
        loss.backward()
        seen.append(held_whole(part))
    return seen


@pytest.mark.parametrize("column", LAYOUT_COLUMNS)
def test_what_is_held_whole_and_when(column: str, tmp_path: Path) -> None:
    layout = {"replica": 2} if column == "replica alone" else {"shard": 2, "zero": int(column.removeprefix("zero "))}
    # Sizes that 2 divides, so that no copy is padded.
    job = tiny_job(tmp_path, processes=2, layout=layout, model={"vocabulary": 258})
    (ends, whole), *seen = run_ranks(2, watch_microbatches, job)[0]
    amounts = {
        "nothing": (0, 0),
        "output layer": (ends, 0),
        "parameters": (whole, 0),
        "parameters and gradients": (whole, whole),
    }
    table = layout_table("held whole")
    told = [amounts[row[column]] for row in table.values()]
    assert list(table) == [
        "after a forward pass",
        "after a backward pass, more to come",
        "after the last backward pass",
    ]
    assert [seen[0], seen[1], seen[3]] == told


# --- Models ----------------------------------------------------------------------------------------------------------


def test_the_models_page_has_the_zoo() -> None:
    page = (ROOT / "docs" / "models.md").read_text()
    shown = [tuple(cell.strip("`") for cell in row.values()) for row in rows(page, "name")]
    assert shown == [
        (name, row.spec.family, f"{count_parameters(row.spec):,}", f"{row.spec.max_positions:,}")
        for name, row in ZOO.items()
    ]


def test_the_models_page_has_the_families() -> None:
    page = (ROOT / "docs" / "models.md").read_text()
    shown = [
        (row["family"].strip("`"), row["`model_type`"].strip("`"), row["trained here"]) for row in rows(page, "family")
    ]
    assert shown == [
        (name, FORMATS[name].model_type if name in FORMATS else "-", "yes" if family.built else "planned only")
        for name, family in FAMILIES.items()
    ]


def test_what_the_models_page_calls_refused_is() -> None:
    """Each key named there is one that the reader looks at."""
    page = (ROOT / "docs" / "models.md").read_text()
    refused = page.split("with the key that says so:")[1].split("Of a family that is planned only")[0]
    keys = {word for word in re.findall(r"`(\w+)", refused) if "_" in word}
    looked_at = {key for form in FORMATS.values() for key in form.only}
    assert keys - {"model_type", "layer_types", "max_window_layers", "gelu_new", "gelu_pytorch_tanh"} == looked_at


# --- Counting --------------------------------------------------------------------------------------------------------


def test_the_counts_of_the_counting_page() -> None:
    page = (ROOT / "docs" / "counting.md").read_text()
    model, sequence = ZOO["llama3-8b"].spec, 8192
    flops, parameters = count_flops(model, sequence), count_parameters(model)
    assert f"{parameters:,} parameters" in page
    embedding, norms = model.vocabulary * model.d_model, (2 * model.layers + 1) * model.d_model
    attention = 12 * model.layers * model.d_model * sequence
    theirs = 6 * (parameters - embedding) + attention
    here = flops.training() / sequence
    table = {row[""]: (row["here"], row["6 N + 12 L D S"]) for row in rows(page, "")}
    giga = [
        3 * flops.layers * flops.block_matmul / sequence,
        3 * flops.layers * flops.block_attention / sequence,
        3 * flops.head / sequence,
    ]
    assert attention == giga[1]
    assert [float(cell) for cell, _ in list(table.values())[:3]] == pytest.approx([n / 1e9 for n in giga], abs=5e-5)
    assert float(table["norms, as 6 FLOPs for each of their weights"][1]) == pytest.approx(6 * norms / 1e9, abs=5e-5)
    assert table["total"] == (f"{here / 1e9:.4f}", f"{theirs / 1e9:.4f}")
    assert f"{100 * (theirs / here - 1):.3f}%" in page
    for other in (here - attention / 2, 6 * (parameters - embedding), 6 * parameters):
        assert f"{other / 1e9:.4f}" in page
        assert f"{100 * (1 - other / here):.0f}% lower" in " ".join(page.split())


# --- Commands and links ----------------------------------------------------------------------------------------------


def quoted_commands(page: str) -> list[str]:
    """Every `meshwright VERB ...` on a page, in a code block or between backquotes."""
    lines = re.findall(r"^(?: {4}|\$ )?(?:\$ )?(meshwright .+)$", page, re.MULTILINE)
    return [*lines, *re.findall(r"`(meshwright [^`\n]+)`", page)]


@each_page
def test_quoted_commands_have_real_options(page: Path) -> None:
    for command in quoted_commands(page.read_text()):
        verb, *arguments = shlex.split(command.replace("...", ""), comments=True)[1:]
        found = cli.commands.get(verb)
        if verb.startswith("-"):
            continue
        assert found is not None, command
        if isinstance(found, click.Group) and arguments:
            found = found.commands[arguments.pop(0)]
        try:
            # Under its parent, whose names for --help a command keeps from the first time it is asked.
            parent = click.Context(cli, info_name="meshwright", **cli.context_settings)
            found.make_context(verb, list(arguments), parent=parent)
        except click.MissingParameter:
            # The verb alone, in a sentence about it.
            assert not arguments, command


def test_the_plan_that_readme_shows_is_what_is_printed() -> None:
    """A plan for a described cluster is the same on every machine."""
    readme = (ROOT / "README.md").read_text()
    command, *shown = re.findall(r"^ {4}\$ meshwright (plan .+\n(?: {4}.+\n)+)", readme, re.MULTILINE)[0].splitlines()
    printed = CliRunner().invoke(cli, shlex.split(command)).output
    lines = {line.strip() for line in printed.splitlines()}
    wrong = [line.strip() for line in shown if line.strip() != "..." and line.strip() not in lines]
    assert not wrong, "\n".join(["README shows lines that are not printed:", *wrong, "", printed])


@each_page
def test_errors_that_a_page_shows_are_real(page: Path) -> None:
    for line in re.findall(r"^ *error: (.+)$", page.read_text(), re.MULTILINE):
        setting = line.partition(": ")[0].replace(" ", "")
        given = setting if "=" in setting else f"{setting}=1"
        with pytest.raises(SettingError) as refused:
            read_job(ROOT / "examples" / "first-run.toml", [given], local=cpu_cluster)
        assert str(refused.value) == line


@each_page
def test_internal_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@each_page
def test_no_page_names_a_path_of_some_machine(page: Path) -> None:
    assert re.findall(r"(?<![\w.])/(?:home|root|tmp|work|Users|mnt|opt|var)/\S*", page.read_text()) == []


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(
        page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")
    )
