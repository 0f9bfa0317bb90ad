"""A job file is a Job or one clear line: the setting, the reason, the nearest thing that works."""

import random
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tomli_w
from jobs import cpu_cluster

from meshwright.spec import ZOO, Cluster, Job, SettingError
from meshwright.spec.decode import decode_job, encode_job, planning_job, read_job
from meshwright.spec.numbers import LARGEST, nearest_divisor

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.toml"


def refusal(path: Path, *settings: str) -> SettingError:
    with pytest.raises(SettingError) as caught:
        read_job(path, settings, local=cpu_cluster)
    return caught.value


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "job.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("setting", "names", "reason", "nearest"),
    [
        # Keys.
        ("run.stepz=3", "run.stepz", "no such setting", "run.steps"),
        ("run.sequence=4", "run.sequence", "no such setting", "data.sequence"),
        ("checkpoint.every=4", "checkpoint.every", "no such setting", "checkpoint.every_steps"),
        ("modle.layers=4", "modle", "no such setting", "model"),
        ("data=5", "data = 5", "is a section", "[data]"),
        # Types.
        ("run.steps=many", 'run.steps = "many"', "must be a whole number", "a whole number"),
        ("run.steps=true", "run.steps = true", "must be a whole number", "a whole number"),
        ("run.steps=2.5", "run.steps = 2.5", "must be a whole number", "a whole number"),
        ("run.steps=nan", "run.steps = nan", "must be a whole number", "a whole number"),
        ("run.steps=1979-05-27", "run.steps = 1979-05-27", "must be a whole number", "a whole number"),
        ("run.steps={a=1}", "run.steps = a section", "must be a whole number", "a whole number"),
        ("run.name=5", "run.name = 5", "must be text", "text"),
        ("model.tied_embeddings=1", "model.tied_embeddings = 1", "must be true or false", "false"),
        ("optimizer.learning_rate=true", "optimizer.learning_rate = true", "must be a number", "0.0003"),
        ("optimizer.betas=[0.9]", "optimizer.betas = [0.9]", "must be a list of length 2", "[0.9,0.95]"),
        ("layout.order=[1]", "layout.order[0] = 1", "must be text", '["pipeline",'),
        ("cluster.processes=0", "cluster.processes = 0", "at least 1", "cluster.processes = 1"),
        ("cluster.processes=true", "cluster.processes = true", "whole number", "cluster.processes = 4"),
        ("cluster.processes=2.0", "cluster.processes = 2.0", "whole number", "cluster.processes = 2"),
        # Numbers.
        ("run.steps=0", "run.steps = 0", "at least 1", "run.steps = 1"),
        ("run.steps=1" + "0" * 30, "run.steps = 1000", "must lie between", f"run.steps = {LARGEST}"),
        ("run.steps=" + "9" * 5000, 'run.steps = "999', "must be a whole number", "a whole number"),
        ("run.seed=-1", "run.seed = -1", "at least 0", "run.seed = 0"),
        ("data.global_batch=0", "data.global_batch = 0", "at least 1", "data.global_batch = 1"),
        ("data.held_out=0.9", "data.held_out = 0.9", "between 0.0 and 0.5", "data.held_out = 0.5"),
        ("data.held_out=nan", "data.held_out = nan", "between 0.0 and 0.5", "data.held_out = 0.0"),
        ("data.held_out=1" + "0" * 400, "data.held_out = 1000", "out of range", "data.held_out = 0.05"),
        ("optimizer.learning_rate=inf", "optimizer.learning_rate = inf", "between", "optimizer.learning_rate = 10.0"),
        ("optimizer.clip_norm=-1", "optimizer.clip_norm = -1.0", "between", "optimizer.clip_norm = 0.0"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas[1] = 1.0", "between", "optimizer.betas[1] = 0.999999"),
        ("optimizer.epsilon=0", "optimizer.epsilon = 0.0", "between", "optimizer.epsilon = 1e-20"),
        ("model.norm_epsilon=-1e-5", "model.norm_epsilon = -1e-05", "between", "model.norm_epsilon = 0.0"),
        ("model.rope_theta=0", "model.rope_theta = 0.0", "between", "model.rope_theta = 1.0"),
        # Shapes that are no model.
        ("model.layers=0", "model.layers = 0", "at least 1", "model.layers = 1"),
        ("model.d_model=-5", "model.d_model = -5", "at least 1", "model.d_model = 1"),
        ("model.heads=3", "model.heads = 3", "does not divide model.d_model = 128", "model.heads = 2"),
        ("model.kv_heads=3", "model.kv_heads = 3", "does not divide model.heads = 4", "model.kv_heads = 2"),
        ("model.head_dim=7", "model.head_dim = 7", "even", "model.head_dim = 8"),
        ("model.name=llama3-8", 'model.name = "llama3-8"', "no such model", "llama3-8b"),
        # Layouts.
        ("layout.shard=0", "layout.shard = 0", "at least one rank", "layout.shard = 1"),
        ("layout.shard=3", "layout.shard = 3", "does not divide data.global_batch = 32", "layout.shard = 2"),
        ("layout.microbatch=3", "layout.microbatch = 3", "does not divide a rank's 8 sequences", "layout.microbatch"),
        ("layout.context=3", "layout.context = 3", "6 pieces, which are not equal", "2, or data.sequence = 258"),
        ("layout.context_form=all-to-all", 'layout.context_form = "all-to-all"', "means nothing", 'form = "ring"'),
        ("layout.schedule=gpipe", 'layout.schedule = "gpipe"', "means nothing with", 'layout.schedule = "1f1b"'),
        ("layout.stage_layers=[4]", "layout.stage_layers = [4]", "means nothing with", "layout.stage_layers = []"),
        ("layout.schedule=1f2b", 'layout.schedule = "1f2b"', "none of", "1f1b"),
        ("layout.tensor=3", "layout.tensor = 3", "does not divide model.heads = 4", "layout.tensor = 2"),
        ("layout.tensor=0", "layout.tensor = 0", "at least one rank", "layout.tensor = 1"),
        ("layout.recompute=-1", "layout.recompute = -1", "model.layers = 4", "layout.recompute = 0"),
        ("layout.recompute=9", "layout.recompute = 9", "model.layers = 4", "layout.recompute = 4"),
        (
            "layout.recompute=selectve",
            'layout.recompute = "selectve"',
            "none of the choices",
            'layout.recompute = "selective"',
        ),
        ("layout.recompute=some", 'layout.recompute = "some"', "none of", '"none", "selective", "full" or a number'),
        ("data.attention=doc", 'data.attention = "doc"', "none of", 'data.attention = "sample" or "document"'),
        ("data.dtype=int8", 'data.dtype = "int8"', "none of", 'data.dtype = "uint16" or "uint32"'),
        ("optimizer.name=adam", 'optimizer.name = "adam"', "none of", 'optimizer.name = "adamw"'),
        ('layout.order=["shrd"]', 'layout.order[0] = "shrd"', "none of", 'layout.order[0] = "shard"'),
        ("layout.async_tensor=true", "layout.async_tensor = true", "needs GPUs", "async_tensor = false"),
        ("layout.expert=2", "layout.expert = 2", "llama has no experts", "layout.expert = 1"),
        ("model.family=llama4", 'model.family = "llama4"', "none of the choices", 'model.family = "llama"'),
        ("model.family=gpt2", "model.max_positions", "learns its positions", "model.max_positions = 1024"),
        ("model.max_positions=8", "data.sequence = 256", "8 positions", "data.sequence = 8"),
        ("model.rope_scaling.factor=0.5", "model.rope_scaling.factor = 0.5", "between", "factor = 1.0"),
        *(
            (f"model.rope_scaling={{factor=8.0, high_frequency={value}}}", "high_frequency", "above low_", "= 4.0")
            for value in ("1.0", "nan", "inf")
        ),
        ("model.experts.count=4", "model.experts", "", ""),
        ("layout.replica=all", 'layout.replica and layout.shard = "all"', "only one axis", "alone"),
        (
            "layout.replica=5",
            "layout.replica = 5",
            "more than the 4 devices",
            "layout.replica = 4",
        ),
        ("layout.tensor=8", "layout.tensor = 8", "more than the 4 devices", "layout.tensor = 4"),
        ("layout.zero=0", "layout.zero = 0", "none of the choices", "layout.zero = 1, 2 or 3"),
        ("layout.precision=fp4", 'layout.precision = "fp4"', "none of", '"fp32", "bf16" or "fp8"'),
        ("layout.precision=fp8", 'layout.precision = "fp8"', "no fp8 products are known of cpu", '"fp32"'),
        ("layout.order=[shard]", 'layout.order = "[shard]"', "must be a list", '["pipeline",'),
        ('layout.order=["shard"]', "layout.order = ['shard']", "each axis", "pipeline"),
        # Clusters.
        ("cluster.nodes=2", "cluster.processes", "beside", "one of the two"),
        # Names.
        ("run.name=a/b", 'run.name = "a/b"', "plain folder name", 'run.name = "run"'),
        ('run.name="a\\u0000b"', "run.name", "plain folder name", 'run.name = "run"'),
        ('data.path=""', 'data.path = ""', "name of a folder", "data.path"),
        # --set itself.
        ("run.steps", "--set run.steps", "section.key=value", "--set run.steps=100"),
        ("=5", "--set =5", "section.key=value", "--set run.steps=100"),
        ("run..steps=5", "--set run..steps=5", "section.key=value", "--set run.steps=100"),
        ("run.steps.more=5", "--set run.steps.more=5", '"steps" is a value', "--set run.steps=100"),
        ("run.steps=1\nname = 2", 'run.steps = "1', "must be a whole number", "a whole number"),
    ],
)
def test_each_bad_setting_is_one_line(setting: str, names: str, reason: str, nearest: str) -> None:
    error = refusal(QUICKSTART, setting)
    assert names in error.setting
    assert reason in error.reason
    assert nearest in error.nearest
    line = str(error)
    assert "\n" not in line and len(line) < 400
    assert error.setting.split()[0] in line and "nearest that works" in line


@pytest.mark.parametrize(
    ("tensor", "changed", "reason", "nearest"),
    [
        (8, {}, "does not divide model.heads = 4", "layout.tensor = 4"),
        (4, {"model.feed_forward": 90}, "does not divide model.feed_forward = 90", "layout.tensor = 2"),
        (4, {"data.sequence": 250}, "does not divide data.sequence = 250", "layout.tensor = 2"),
        (
            4,
            {"model.heads": 12, "model.kv_heads": 6, "model.head_dim": 8},
            "neither divides model.kv_heads = 6 nor is a",
            "layout.tensor = 2",
        ),
        (2, {"model.vocabulary": 1}, "is more than model.vocabulary = 1", "layout.tensor = 1"),
        # Byte tokens over 32 ranks: nine a rank, and none left for the last three.
        (32, {"model.heads": 32, "model.head_dim": 4}, "none of model.vocabulary = 257 tokens", "layout.tensor = 16"),
    ],
)
def test_each_split_that_does_not_go_is_one_line(
    tensor: int, changed: dict[str, int], reason: str, nearest: str
) -> None:
    settings = [f"{name}={value}" for name, value in changed.items()]
    processes = ["layout.shard=1", f"layout.tensor={tensor}", f"cluster.processes={tensor}"]
    error = refusal(QUICKSTART, *settings, *processes)
    assert error.setting == f"layout.tensor = {tensor}"
    assert reason in error.reason
    assert error.nearest == nearest
    assert "\n" not in str(error)
    # What it says works, works.
    near = error.nearest.rpartition(" ")[2]
    if changed.get("model.vocabulary") != 1:
        read_job(
            QUICKSTART,
            [*settings, "layout.shard=1", f"layout.tensor={near}", f"cluster.processes={near}"],
            local=cpu_cluster,
        )


def test_transfers_beside_products_need_a_tensor_axis() -> None:
    with pytest.raises(SettingError, match="nothing is split along the tensor axis"):
        read_job(QUICKSTART, ["cluster.gpus=8xh100", "layout.async_tensor=true"], local=no_machine)


def test_transfers_beside_products_need_gpus() -> None:
    error = refusal(QUICKSTART, "layout.shard=2", "layout.tensor=2", "layout.async_tensor=true")
    assert (error.setting, error.reason) == ("layout.async_tensor = true", "needs GPUs")
    assert error.nearest == "layout.async_tensor = false"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[run\n", "is not TOML"),
        ("run = {name = 'x', steps = 1}\nrun = 2\n", "is not TOML"),
        ("x = " + "[" * 3000, "is not TOML"),
        ("x = " + "9" * 5000, "is not TOML"),
        (b"\xff\xfe\x00", "cannot be read as a job file"),
        ("", "run: is missing"),
        ("[[run]]\nname = 'x'\n", "is a section, not a value"),
        ("[run]\nname = 'x'\n", "is missing"),
        ("run = 5\n", "is a section, not a value"),
    ],
)
def test_each_bad_file_is_one_line(tmp_path: Path, text: str | bytes, says: str) -> None:
    line = str(refusal(written(tmp_path, text)))
    assert says in line and "\n" not in line


def test_a_missing_key_is_named_with_its_section(tmp_path: Path) -> None:
    table = tomllib.loads(QUICKSTART.read_text())
    del table["run"]["steps"]
    error = refusal(written(tmp_path, tomli_w.dumps(table)))
    assert (error.setting, error.reason) == ("run.steps", "is missing")
    assert error.nearest == "add steps = ... under [run]"


@pytest.mark.parametrize("form", ["utf-8-sig", "crlf"])
def test_editors_of_all_kinds(tmp_path: Path, form: str) -> None:
    text = QUICKSTART.read_text()
    raw = text.replace("\n", "\r\n").encode() if form == "crlf" else text.encode("utf-8-sig")
    assert read_job(written(tmp_path, raw), local=cpu_cluster) == read_job(QUICKSTART, local=cpu_cluster)


@pytest.mark.parametrize(
    ("setting", "of", "value"),
    [
        ("run.steps=7", lambda job: job.run.steps, 7),
        (" run.steps = 7 ", lambda job: job.run.steps, 7),
        ("run.name=other", lambda job: job.run.name, "other"),
        ('run.name="o=p"', lambda job: job.run.name, "o=p"),
        ("run.name=o=p", lambda job: job.run.name, "o=p"),
        ("optimizer.learning_rate=1", lambda job: job.optimizer.learning_rate, 1.0),
        ("optimizer.betas=[0.8, 0.9]", lambda job: job.optimizer.betas, (0.8, 0.9)),
        ("layout.shard=2", lambda job: job.layout.shard, 2),
        ("model.tied_embeddings=false", lambda job: job.model.tied_embeddings, False),
    ],
)
def test_set_changes_one_key(setting: str, of: Any, value: object) -> None:
    assert of(read_job(QUICKSTART, [setting], local=cpu_cluster)) == value


@pytest.mark.parametrize(
    ("gpus", "says"),
    [("8xh1000", "h100"), ("0xh100", "holds no device"), ("h100", "8xh100"), ("8 of h100", "must look like")],
)
def test_cluster_words(gpus: str, says: str) -> None:
    with pytest.raises(SettingError, match=says):
        planning_job(model="llama3-8b", gpus=gpus, sequence=128, global_batch=8)


def test_a_cluster_given_by_numbers_is_checked() -> None:
    section = msgspec.to_builtins(cpu_cluster(4))
    table = tomllib.loads(QUICKSTART.read_text())

    def refused(**changes: Any) -> SettingError:
        with pytest.raises(SettingError) as caught:
            decode_job(table | {"cluster": section | changes}, local=cpu_cluster)
        return caught.value

    assert decode_job(table | {"cluster": section}, local=cpu_cluster).layout.shard == 4
    assert "cluster.nodes = 0" in refused(nodes=0).setting
    assert refused(nodes="two").setting == 'cluster.nodes = "two"'
    assert refused(nodes="two").nearest == "cluster.nodes = 1"
    assert "cluster.intra.bytes_per_s = 0.0" in refused(intra=section["intra"] | {"bytes_per_s": 0.0}).setting
    assert (
        "cluster.device.memory_bytes = nan"
        in refused(device=section["device"] | {"memory_bytes": float("nan")}).setting
    )
    assert refused(device="h100").setting == 'cluster.device = "h100"'
    del section["devices_per_node"]
    assert refused().setting == "cluster.devices_per_node"


def test_no_cluster_is_smaller_than_its_layout() -> None:
    error = refusal(QUICKSTART, "layout.shard=8", "layout.microbatch=4")
    assert error.setting == "layout of 8 ranks" and "more ranks than devices" in error.reason
    assert error.nearest == "sizes that multiply to 4"


def test_divisors_near_what_was_asked() -> None:
    for number in range(1, 200):
        for wanted in range(1, 220, 7):
            best = min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - wanted), d))
            assert nearest_divisor(number, wanted) == best
    # A prime near the largest size that is accepted: found by trial up to its root.
    assert nearest_divisor(1099511627689, 10**9) == 1


def jobs() -> list[Job]:
    planned = [
        planning_job(model=model, gpus=gpus, sequence=512, global_batch=32)
        for model in ZOO
        for gpus in ("1xh100", "4x8xh200", "8xa100-40")
    ]
    settings = ['run.name="q\\"uote # 1"', "layout.order=['shard','pipeline','context','replica','tensor']"]
    return [*planned, read_job(QUICKSTART, settings, local=cpu_cluster)]


def no_machine(processes: int) -> Cluster:
    raise AssertionError(f"asked for the machine ({processes} processes)")


@pytest.mark.parametrize("job", jobs(), ids=lambda job: f"{job.model.name}-{job.cluster.devices}")
def test_a_written_job_reads_back_the_same(tmp_path: Path, job: Job) -> None:
    assert read_job(written(tmp_path, encode_job(job)), local=no_machine) == job


VALUES = (
    *(0, 1, 2, 3, -1, 7, 2**31, 2**40 - 87, 2**63, 10**30, True, False, 0.0, -0.5, 1e-300, 1e300),
    *(float("nan"), float("inf"), -float("inf"), "", "all", "auto", "x", "a\x00b", "\n", "8xh100", "é", [], [1], ["a"]),
    *([[]], {}, {"a": 1}, [0.5, 0.5], ["tensor"] * 5),
)


def mutate(table: dict[str, Any], chance: random.Random) -> None:
    """One random slip: a value replaced, a key dropped, misspelt, moved or added; sections likewise."""
    section = chance.choice(list(table))
    kind = chance.randrange(7)
    inner = table[section]
    if kind == 0 or not isinstance(inner, dict) or not inner:
        table[section] = chance.choice(VALUES)
    elif kind == 1:
        del table[section]
    elif kind == 2:
        inner.pop(chance.choice(list(inner)))
    elif kind == 3:
        key = chance.choice(list(inner))
        inner[key[: chance.randrange(len(key))] + chance.choice("abc_")] = inner.pop(key)
    elif kind == 4:
        key = chance.choice(list(inner))
        table[chance.choice(list(table))] = {key: inner[key]}
    elif kind == 5:
        names = [f.name for f in msgspec.structs.fields(Job)]
        other = chance.choice(names)
        types = {f.name: f.type for f in msgspec.structs.fields(Job)}
        keys = [f.name for f in msgspec.structs.fields(types[other])] + ["gpus", "processes"]
        target = table.setdefault(other, {})
        if isinstance(target, dict):
            target[chance.choice(keys)] = chance.choice(VALUES)
    else:
        inner[chance.choice(list(inner))] = chance.choice(VALUES)


def decoded(table: dict[str, Any]) -> Job | SettingError:
    try:
        return decode_job(tomllib.loads(tomli_w.dumps(table)), local=cpu_cluster)
    except SettingError as error:
        return error


def test_no_slip_of_the_pen_gives_anything_but_a_job_or_a_line() -> None:
    chance = random.Random(20261122)
    read = refused = 0
    for _ in range(4000):
        table = tomllib.loads(QUICKSTART.read_text())
        for _ in range(chance.choice((1, 1, 2, 3))):
            if table:
                mutate(table, chance)
        job = decoded(table)
        if isinstance(job, SettingError):
            refused += 1
            line = str(job)
            assert line and "\n" not in line and len(line) < 500, table
            assert job.setting and job.reason, table
        else:
            read += 1
            assert decode_job(tomllib.loads(encode_job(job)), local=no_machine) == job, table
    # Both ends are reached, or the loop tests nothing.
    assert refused > 1000 and read > 200


def test_settings_of_another_optimizer_are_refused() -> None:
    error = refusal(QUICKSTART, "optimizer.name=sgd", "optimizer.betas=[0.9, 0.99]")
    assert "means nothing to sgd" in str(error)


def test_all_takes_as_many_devices_as_divide_the_batch() -> None:
    sizes = {gpus: read_job(QUICKSTART, [f"cluster.gpus={gpus}xh100"], local=no_machine).layout for gpus in (1, 3, 7)}
    assert [(layout.shard, layout.microbatch) for layout in sizes.values()] == [(1, 32), (2, 16), (4, 8)]


def test_fewer_processes_than_offered_share_the_machine() -> None:
    job = read_job(QUICKSTART, ["layout.shard=1"], local=cpu_cluster)
    assert job.cluster == cpu_cluster(1)


def test_evaluating_nothing_is_refused() -> None:
    assert "nothing is held out" in str(refusal(QUICKSTART, "data.held_out=0", "evaluation.every_steps=5"))
