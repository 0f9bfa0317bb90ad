"""What --set does to a job file, what is named instead of a file that is none, and settings that only GPUs have."""

from pathlib import Path

import msgspec
import pytest
from jobs import cpu_cluster

from meshwright.spec import ZOO, Cluster, SettingError
from meshwright.spec.decode import decode_job, read_job

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.toml"


def refusal(path: Path, *settings: str) -> SettingError:
    with pytest.raises(SettingError) as caught:
        read_job(path, settings, local=cpu_cluster)
    return caught.value


def no_machine(_: int) -> Cluster:
    raise AssertionError("nothing about this machine is asked")


def test_a_word_for_a_whole_cluster_replaces_the_one_in_the_file() -> None:
    job = read_job(QUICKSTART, ["cluster.gpus=8xh100"], local=no_machine)
    assert (job.cluster.devices, job.layout.shard, job.layout.microbatch, job.layout.precision) == (8, 8, 4, "bf16")
    with pytest.raises(SettingError, match=r"beside cluster\.gpus"):
        decode_job({"cluster": {"gpus": "8xh100", "processes": 2}}, local=no_machine)


def test_a_word_for_a_whole_model_replaces_the_one_in_the_file() -> None:
    zoo = ZOO["llama3-8b"].spec
    assert read_job(QUICKSTART, ["model.name=llama3-8b"], local=cpu_cluster).model == zoo
    # Whatever comes first: what else is set changes the model that is named.
    for settings in (["model.name=llama3-8b", "model.layers=4"], ["model.layers=4", "model.name=llama3-8b"]):
        job = read_job(QUICKSTART, settings, local=cpu_cluster)
        assert job.model == msgspec.structs.replace(zoo, layers=4)
    assert read_job(QUICKSTART, ["model.name=custom"], local=cpu_cluster).model.layers == 4


def test_tokens_come_from_the_key_that_was_set(tmp_path: Path) -> None:
    sources = 'data.sources=[{path = "a"}, {path = "b"}]'
    job = read_job(QUICKSTART, [sources], local=cpu_cluster)
    assert (job.data.path, [source.path for source in job.data.sources]) == ("", ["a", "b"])
    mixed = tmp_path / "job.toml"
    mixed.write_text(QUICKSTART.read_text().replace('path = "stdlib"', 'sources = [{path = "a"}]'))
    assert read_job(mixed, ["data.path=b"], local=cpu_cluster).data.named_sources()[0][1].path == "b"
    # Given both, neither can be meant to replace the other.
    assert "data.sources is given too" in str(refusal(QUICKSTART, sources, "data.path=b"))


def test_a_cluster_that_is_not_here_is_refused_before_its_layout() -> None:
    def admit(cluster: Cluster) -> None:
        raise SettingError(cluster.label(), "is not here")

    with pytest.raises(SettingError, match="8 x h100"):
        read_job(QUICKSTART, ["cluster.gpus=8xh100", "layout.microbatch=5"], local=no_machine, admit=admit)


def test_only_jobs_are_named_in_the_place_of_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    missing = tmp_path / "nofile.toml"
    assert refusal(missing).nearest == "examples/quickstart.toml"
    job = tmp_path / "job.toml"
    job.write_text(QUICKSTART.read_text())
    assert refusal(missing).nearest == str(job)
    folder = refusal(tmp_path)
    assert folder.nearest == str(job) and "Is a directory" in folder.reason


def test_the_later_set_wins() -> None:
    assert read_job(QUICKSTART, ["run.steps=7", "run.steps=8"], local=cpu_cluster).run.steps == 8


@pytest.mark.parametrize(
    ("settings", "setting", "reason", "nearest"),
    [
        (["layout.offload=optimizer"], 'layout.offload = "optimizer"', "devices are CPUs", 'layout.offload = "none"'),
        (
            ["layout.zero=3", "layout.offload=parameters"],
            'layout.offload = "parameters"',
            "devices are CPUs",
            'layout.offload = "none"',
        ),
        (
            ["cluster.gpus=8xh100", "layout.offload=optimizer", "optimizer.name=sgd"],
            'layout.offload = "optimizer"',
            "sgd keeps no states",
            'layout.offload = "none"',
        ),
        (
            ["cluster.gpus=8xh100", "layout.offload=parameters", "layout.zero=2"],
            'layout.zero = 2 with layout.offload = "parameters"',
            "parameters that stay gathered",
            "layout.zero = 3",
        ),
        (["layout.offload=all"], 'layout.offload = "all"', "none of", '"none", "optimizer" or "parameters"'),
    ],
)
def test_what_cannot_be_offloaded_is_refused(settings: list[str], setting: str, reason: str, nearest: str) -> None:
    local = no_machine if settings[0].startswith("cluster") else cpu_cluster
    with pytest.raises(SettingError) as told:
        read_job(QUICKSTART, settings, local=local)
    assert told.value.setting == setting
    assert reason in told.value.reason and nearest in told.value.nearest


@pytest.mark.parametrize(
    ("setting", "nearest"),
    [
        # A word in capitals; one letter too many; a word cut short; another kind of number; a list without brackets.
        ("layout.schedule=1F1B", 'layout.schedule = "1f1b"'),
        ("layout.experts=2", "layout.expert"),
        ("layout.stages=2", "layout.stages_per_rank"),
        ("model.name=qwen3-30b", "qwen3-30b-a3b"),
        ("layout.pipeline=2.0", "layout.pipeline = 2"),
        ("layout.stage_layers=4,4", "layout.stage_layers = [4, 4]"),
    ],
)
def test_a_slip_is_told_what_was_meant(setting: str, nearest: str) -> None:
    assert refusal(QUICKSTART, setting).nearest == nearest
