"""What a refusal offers works as it is typed, on the job as it was given."""

import itertools
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from jobs import cpu_cluster

from meshwright.spec import Job, SettingError
from meshwright.spec.decode import encode_job, planning_job, read_job
from meshwright.spec.huggingface import config_of_model

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.toml"
# Two ways out, and the settings of one that go together.
WAYS, TOGETHER = ", or ", " with "


def planned(settings: list[str], *, model: str = "llama3-8b", gpus: str = "8xh100", batch: int = 16) -> Job:
    return planning_job(model=model, gpus=gpus, sequence=8192, global_batch=batch, settings=settings)


def quickstart(settings: list[str]) -> Job:
    return read_job(QUICKSTART, settings, local=cpu_cluster)


def offers_of(error: SettingError) -> list[list[str]]:
    """The --set of each way out."""
    ways = error.nearest.split(WAYS) if error.nearest else []
    return [[word.replace(" = ", "=", 1) for word in way.split(TOGETHER)] for way in ways]


SETTINGS: dict[str, tuple[str, ...]] = {
    "pipeline": ("1", "2", "4", "8", "16"),
    "schedule": ("1f1b", "interleaved", "zbv", "dualpipev"),
    "stages_per_rank": ("", "2", "9"),
    "microbatch": ("", "4", "all"),
    "zero": ("", "1"),
    "shard": ("2", "all"),
    "offload": ("", "parameters"),
}


def refusal(settings: list[str]) -> SettingError | None:
    try:
        planned(settings)
    except SettingError as error:
        return error
    return None


def test_every_offer_works_as_it_is_typed() -> None:
    refused = several = 0
    for values in itertools.product(*SETTINGS.values()):
        given = [f"layout.{name}={value}" for name, value in zip(SETTINGS, values, strict=True) if value]
        error = refusal(given)
        if error is not None and "devices" not in error.reason:
            offers = offers_of(error)
            assert offers, (given, str(error))
            refused += 1
            several += len(offers) > 1
            for offer in offers:
                planned([*given, *offer])
    assert refused > 300 and several > 100


@pytest.mark.parametrize(
    ("model", "gpus", "batch", "given", "nearest"),
    [
        # A rank's whole share at once is one microbatch, however large the batch.
        ("llama3.2-1b", "8xh100", 128, ["pipeline=2", "microbatch=all"], "layout.microbatch = 16"),
        # Fewer ranks of the pipeline leave more for the data, and so fewer microbatches.
        ("llama3-70b", "8x8xh100", 32, ["pipeline=8"], "data.global_batch = 64"),
        # Neither a smaller microbatch nor what it needs besides works alone.
        (
            "llama3-8b",
            "8xh100",
            16,
            ["pipeline=4", "shard=2", "microbatch=4", "schedule=zbv"],
            "layout.microbatch = 2 with layout.zero = 1",
        ),
        (
            "llama3-8b",
            "8xh100",
            16,
            ["pipeline=2", "shard=2", "schedule=zbv", "offload=parameters"],
            'layout.zero = 1 with layout.offload = "optimizer", or layout.schedule = "1f1b"',
        ),
        (
            "llama3-8b",
            "8xh100",
            16,
            ["pipeline=2", "shard=2", "schedule=zbv", "offload=parameters", "zero=1"],
            'layout.offload = "optimizer"',
        ),
        (
            "llama3-8b",
            "8xh100",
            16,
            ["pipeline=8", "schedule=interleaved", "stages_per_rank=9"],
            "layout.stages_per_rank = 4, or layout.pipeline = 3",
        ),
        ("llama3-8b", "8xh100", 16, ["stages_per_rank=2"], "layout.stages_per_rank = 0"),
        # However long a pipeline the model and the batch allow: first of all there are too few devices.
        ("llama3-8b", "8xh100", 16, ["pipeline=16", "shard=1"], "sizes that multiply to 8"),
        ("llama3-8b", "8xh100", 16, ["pipeline=16"], "layout.pipeline = 8"),
    ],
)
def test_what_is_nearest(model: str, gpus: str, batch: int, given: list[str], nearest: str) -> None:
    settings = [f"layout.{setting}" for setting in given]
    with pytest.raises(SettingError) as refused:
        planned(settings, model=model, gpus=gpus, batch=batch)
    assert refused.value.nearest == nearest


def test_a_pipeline_of_a_job_that_takes_all_at_once() -> None:
    with pytest.raises(SettingError) as refused:
        quickstart(["layout.pipeline=2"])
    assert refused.value.nearest == "layout.microbatch = 8"
    assert quickstart(["layout.pipeline=2", "layout.microbatch=8"]).layout.shard == 2


# --- What the file says of an axis that a --set takes away ------------------------------------------------------------


def resolved(folder: Path, **layout: Any) -> Path:
    """A job file as a run keeps it."""
    job = quickstart([f"layout.{name}={value}" for name, value in layout.items()])
    path = folder / "job.toml"
    path.write_text(encode_job(job))
    return path


def test_an_axis_takes_what_is_said_of_it_along(tmp_path: Path) -> None:
    zbv = {"pipeline": 2, "shard": 2, "microbatch": 4, "schedule": "zbv", "zero": 1, "stage_layers": [1, 1, 1, 1]}
    path = resolved(tmp_path, **zbv)
    layout = read_job(path, ["layout.pipeline=1"], local=cpu_cluster).layout
    assert (layout.schedule, layout.stages_per_rank, layout.stage_layers) == ("1f1b", 0, ())
    with pytest.raises(SettingError) as refused:
        read_job(path, ["layout.pipeline=1", "layout.schedule=zbv"], local=cpu_cluster)
    assert refused.value.nearest.startswith('layout.schedule = "1f1b"')
    path = resolved(tmp_path, context=2, shard=2, context_form="all-to-all")
    assert read_job(path, ["layout.context=1"], local=cpu_cluster).layout.context_form == "ring"
    assert read_job(path, ["layout.context=1"], local=cpu_cluster).layout.shard == 2


def test_what_a_file_says_of_an_axis_it_does_not_have_is_refused(tmp_path: Path) -> None:
    path = resolved(tmp_path)
    table = tomllib.loads(path.read_text())
    table["layout"] |= {"schedule": "zbv", "stages_per_rank": 2}
    path.write_text(tomli_w.dumps(table))
    with pytest.raises(SettingError) as refused:
        read_job(path, local=cpu_cluster)
    assert refused.value.nearest == 'layout.schedule = "1f1b" with layout.stages_per_rank = 0'


# --- What a pure mixture does not need --------------------------------------------------------------------------------


def test_a_mixture_without_plain_layers_needs_no_width_of_them(tmp_path: Path) -> None:
    table = tomllib.loads((QUICKSTART.parent / "mixture.toml").read_text())
    experts = table["model"]["experts"] | {"feed_forward": 1530}
    table["model"] |= {"family": "mixtral", "experts": experts}
    table["model"].pop("feed_forward", None)
    path = tmp_path / "job.toml"
    path.write_text(tomli_w.dumps(table))
    gpus = ["cluster.gpus=8xh100", "layout.microbatch=1"]
    model = read_job(path, gpus, local=cpu_cluster).model
    assert model.feed_forward == 1530
    assert config_of_model(model)["intermediate_size"] == 1530
    # Nor does a width that no layer has keep ranks of tensor from dividing the others.
    assert read_job(path, [*gpus, "layout.tensor=4"], local=cpu_cluster).layout.tensor == 4
    with pytest.raises(SettingError, match=r"model\.feed_forward: is missing"):
        read_job(path, [*gpus, "model.experts.dense_layers=1"], local=cpu_cluster)
