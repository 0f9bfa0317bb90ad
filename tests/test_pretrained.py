"""What a Hugging Face folder is refused for, before a process starts; its config.json; and the commands on it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from click.testing import CliRunner
from commands import run, write_job
from jobs import cpu_cluster

from meshwright.cli import cli
from meshwright.launch import begin_attempt, find_model
from meshwright.record import create_run
from meshwright.spec import ZOO, Job, ModelSpec, SettingError, parameter_shapes
from meshwright.spec.decode import encode_job, read_job
from meshwright.spec.huggingface import config_of_model
from meshwright.spec.pretrained import CONFIG, INDEX_FILE, SINGLE_FILE, read_stored
from meshwright.spec.tensors import pieces_of, their_shapes

Shapes = dict[str, tuple[int, ...]]
LLAMA = ModelSpec(
    layers=2, d_model=16, heads=2, kv_heads=1, head_dim=8, feed_forward=24, vocabulary=257, max_positions=64
)
TIED = msgspec.structs.replace(LLAMA, tied_embeddings=True)
GPT2 = ModelSpec(
    family="gpt2",
    layers=1,
    d_model=16,
    heads=2,
    kv_heads=2,
    head_dim=8,
    feed_forward=64,
    vocabulary=257,
    max_positions=64,
    tied_embeddings=True,
)


def write_tensors(path: Path, shapes: Shapes, dtype: str = "F32", fill: Callable[[str], int] = lambda name: 0) -> None:
    """A safetensors file whose tensors hold one byte each, again and again."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, shape in shapes.items():
        size = 2 if dtype == "BF16" else 4
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + size]}
        body += bytes([fill(name)]) * size
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def write_folder(folder: Path, model: ModelSpec = LLAMA, changed: Shapes | None = None, **more: Any) -> Path:
    """A Hugging Face folder of zeros; `changed` tensors are added, or take other shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config_of_model(model) | more))
    write_tensors(folder / SINGLE_FILE, their_shapes(pieces_of(model)) | (changed or {}))
    return folder


def job_at(folder: Path, model: dict[str, Any]) -> Path:
    """A job file whose [model] says no more than given."""
    path = write_job(folder, ranks=1)
    kept = path.read_text().split("[model]")
    rest = kept[1].partition("\n[")[2]
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in model.items())
    path.write_text(f"{kept[0]}[model]\n{lines}\n[{rest}")
    return path


def decoded(folder: Path, **model: Any) -> Job:
    return read_job(job_at(folder, model), local=cpu_cluster)


def refusal(folder: Path, **model: Any) -> SettingError:
    with pytest.raises(SettingError) as refused:
        decoded(folder, **model)
    return refused.value


# --- A job from a config or a folder ---------------------------------------------------------------------------------


def test_a_config_gives_the_numbers_and_leaves_no_trace(tmp_path: Path) -> None:
    config = write_folder(tmp_path / "hf") / CONFIG
    job = decoded(tmp_path, config=str(config))
    assert job.model == LLAMA
    assert decoded(tmp_path, config=str(config), rope_theta=5e5).model == msgspec.structs.replace(LLAMA, rope_theta=5e5)


def test_a_folder_gives_the_numbers_once(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf")
    job = decoded(tmp_path, path=str(folder), max_positions=32)
    assert job.model == msgspec.structs.replace(LLAMA, path=str(folder), max_positions=32)
    shutil.rmtree(folder)
    resolved = tmp_path / "resolved.toml"
    resolved.write_text(encode_job(job))
    assert read_job(resolved, local=cpu_cluster) == job


@pytest.mark.parametrize(
    "model",
    [
        {"name": "llama3-8b", "path": "hf"},
        {"name": "llama3-8b", "config": "hf/config.json"},
        {"config": "hf/config.json", "path": "hf"},
    ],
)
def test_numbers_come_from_one_place(model: dict[str, str], tmp_path: Path) -> None:
    assert "two ways" in refusal(tmp_path, **model).reason


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "cannot be read"), ("{", "is not JSON"), ("[]", "is no object"), ("[" * 10**5, "is not JSON")],
)
def test_a_config_that_is_none(content: str | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / CONFIG
    if content is not None:
        path.write_text(content)
    refused = refusal(tmp_path, config=str(path))
    assert says in refused.reason and str(path) in refused.setting


# --- Tensors ---------------------------------------------------------------------------------------------------------

UP = "model.layers.1.mlp.up_proj.weight"


def without(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        shapes = {key: shape for key, shape in their_shapes(pieces_of(LLAMA)).items() if key != name}
        write_tensors(folder / SINGLE_FILE, shapes)

    return change


def having(name: str, shape: tuple[int, ...]) -> Callable[[Path], None]:
    return lambda folder: write_tensors(folder / SINGLE_FILE, their_shapes(pieces_of(LLAMA)) | {name: shape})


def quantized(folder: Path) -> None:
    write_tensors(folder / SINGLE_FILE, their_shapes(pieces_of(LLAMA)), dtype="I32")


def cut_short(folder: Path) -> None:
    path = folder / SINGLE_FILE
    path.write_bytes(path.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    (folder / SINGLE_FILE).rename(folder / "pytorch_model.bin")


def indexed(folder: Path) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {UP: "model-00002-of-00002.safetensors"}}))


@pytest.mark.parametrize(
    ("harm", "says", "nearest"),
    [
        (without(UP), f"holds no tensor {UP};", "the whole folder"),
        (without("lm_head.weight"), "holds no tensor lm_head.weight", "model.tied_embeddings = true"),
        (having("model.layers.1.mlp.extra.weight", (3,)), "holds model.layers.1.mlp.extra.weight, for which", ""),
        (having("model.layers.2.mlp.up_proj.weight", (24, 16)), "holds model.layers.2.mlp.up_proj.weight", "numbers"),
        (having(UP, (16, 24)), f"{UP} has shape [16, 24] where the model has [24, 16]", "config.json"),
        (quantized, "is stored as I32", "bf16 or fp32"),
        (cut_short, "bytes where its header counts", "downloaded again"),
        (lambda folder: (folder / SINGLE_FILE).write_bytes(b"\x80\x04 what"), "is damaged", "downloaded again"),
        (lambda folder: (folder / SINGLE_FILE).write_bytes(b""), "is damaged", "downloaded again"),
        (lambda folder: (folder / SINGLE_FILE).unlink(), "holds no model.safetensors", "model.config = "),
        (indexed, "model-00002-of-00002.safetensors: cannot be read", "downloaded again"),
        (pickled, "pytorch_model.bin, a pickle, and nothing is unpickled", "safetensors"),
    ],
)
def test_a_folder_that_does_not_fit(harm: Callable[[Path], None], says: str, nearest: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf")
    harm(folder)
    refused = refusal(tmp_path, path=str(folder))
    assert says in str(refused) and nearest in refused.nearest


def test_a_number_beside_the_folder_that_changes_a_tensor(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf")
    assert "where the model has [32, 16]" in refusal(tmp_path, path=str(folder), feed_forward=32).reason
    assert "holds no tensor model.layers.2" in refusal(tmp_path, path=str(folder), layers=3).reason


def test_a_resumed_run_without_a_checkpoint_is_checked_again(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf")
    job = decoded(tmp_path, path=str(folder))
    made = create_run(tmp_path / "runs" / "one", encode_job(job))
    begin_attempt(made, job)
    without(UP)(folder)
    with pytest.raises(SettingError, match="holds no tensor"):
        begin_attempt(made, job)
    shutil.rmtree(folder)
    with pytest.raises(SettingError, match="is no folder"):
        begin_attempt(made, job)


@pytest.mark.parametrize(
    ("model", "extra"),
    [
        (LLAMA, {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,)}),
        (GPT2, {"transformer.h.0.attn.bias": (1, 1, 64, 64), "transformer.h.0.attn.masked_bias": ()}),
        (TIED, {"lm_head.weight": (257, 16)}),
        (GPT2, {"lm_head.weight": (257, 16)}),
    ],
)
def test_what_old_files_hold_besides_is_passed_over(model: ModelSpec, extra: Shapes, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", model, extra)
    assert decoded(tmp_path, path=str(folder)).model.path == str(folder)


def test_a_tied_head_must_be_the_embedding(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", TIED)
    shapes = their_shapes(pieces_of(LLAMA))
    write_tensors(folder / SINGLE_FILE, shapes, fill=lambda name: int(name == "lm_head.weight"))
    refused = refusal(tmp_path, path=str(folder))
    assert "is not the embedding" in refused.reason and refused.nearest == "model.tied_embeddings = false"
    # And what it says works.
    assert not decoded(tmp_path, path=str(folder), tied_embeddings=False).model.tied_embeddings


@pytest.mark.parametrize("model", [TIED, GPT2], ids=["llama", "gpt2"])
def test_a_model_saved_without_its_head_has_shorter_names(model: ModelSpec, tmp_path: Path) -> None:
    """As GPT-2 itself is on the hub."""
    folder = write_folder(tmp_path / "hf", model)
    shapes = their_shapes(pieces_of(model))
    write_tensors(folder / SINGLE_FILE, {name.partition(".")[2]: shape for name, shape in shapes.items()})
    job = decoded(tmp_path, path=str(folder))
    assert set(read_stored(job.model)) == set(shapes)


def test_every_parameter_has_its_place() -> None:
    for model in (LLAMA, TIED, GPT2):
        pieces = pieces_of(model)
        assert {piece.ours: piece.shape for piece in pieces} == parameter_shapes(model)
        taken = {(piece.theirs, row) for piece in pieces for row in range(piece.first, piece.first + piece.shape[0])}
        assert len(taken) == sum(piece.shape[0] for piece in pieces)


def test_every_experts_matrices_have_their_place() -> None:
    for name in ("mixtral-8x7b", "qwen3-30b-a3b"):
        model = ZOO[name].spec
        stacks: dict[str, list[tuple[int, ...]]] = {}
        for piece in pieces_of(model):
            stacks.setdefault(piece.ours, []).append(piece.shape)
        whole = {ours: shapes[0] if len(shapes) == 1 else (len(shapes), *shapes[0]) for ours, shapes in stacks.items()}
        assert whole == parameter_shapes(model)
        assert len({piece.theirs for piece in pieces_of(model)}) == len(pieces_of(model))


def test_families_that_are_only_planned_are_not_trained(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config_of_model(ZOO["deepseek-v3"].spec)))
    job = decoded(tmp_path, path=str(folder))
    assert job.model.family == "deepseek-v3"
    with pytest.raises(SettingError, match="training it is not built"):
        begin_attempt(None, job)
    assert not Path(job.run.folder).exists()


# --- The commands ----------------------------------------------------------------------------------------------------


def test_a_name_that_is_no_folder(tmp_path: Path) -> None:
    for name in ("some/where/else", "/nowhere", "./here"):
        with pytest.raises(SettingError, match="is no folder, and no name"):
            find_model(name, download=False)
    with pytest.raises(SettingError, match="local cache") as refused:
        find_model("nobody/nothing-at-all", download=False)
    assert refused.value.nearest == "hf download nobody/nothing-at-all on every host first"
    assert "is no folder" in refusal(tmp_path, path=str(tmp_path / "gone")).reason


def convert(run_folder: Path, *arguments: object) -> tuple[int, str]:
    """`meshwright convert`, in this process: its exit code, and what it printed or how it refused."""
    result = CliRunner().invoke(cli, ["convert", str(run_folder), *map(str, arguments)], standalone_mode=False)
    refused = isinstance(result.exception, SettingError | click.ClickException)
    assert refused or result.exception is None, result.exception
    return result.exit_code, str(result.exception) if refused else result.output


@pytest.mark.slow
def test_from_a_folder_and_back_on_the_command_line(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf", bos_token_id=3)
    (folder / "tokenizer.json").write_text("{}")
    job = job_at(tmp_path, {"path": str(folder)})
    trained = run("train", job)
    assert trained.returncode == 0, trained.stderr
    runs, out = tmp_path / "runs" / "tiny", tmp_path / "runs" / "tiny" / "hf-step-6"
    assert convert(runs, "--to", "hf") == (0, f"written: {out}\n")
    config = json.loads((out / CONFIG).read_text())
    assert config["bos_token_id"] == 3 and config["eos_token_id"] is None and config["dtype"] == "float32"
    assert (out / "tokenizer.json").is_file()
    # What was written can be trained on.
    assert read_job(job, [f"model.path={out}"], local=cpu_cluster).model.layers == 2
    # The run needs its first folder no more.
    shutil.rmtree(folder)
    resumed = run("train", "--resume", runs, "--set", "run.steps=7")
    assert resumed.returncode == 0, resumed.stderr
    for arguments, says in (
        (("--to", "hf"), "is gone, and its dtype would be the default"),
        (("--to", "hf", "--dtype", "bf16", "--out", runs), "exists already"),
        (("--to", "gguf"), "--to gguf: is none that is written here; nearest that works: --to hf"),
        (("--to", "hf", "--dtype", "fp16"), "--dtype fp16: is none that is written here"),
        ((), "Missing parameter: form"),
    ):
        code, line = convert(runs, *arguments)
        assert code and says in line
    new = tmp_path / "new" / "out"
    code, said = convert(runs, "--to", "hf", "--dtype", "bf16", "--out", new)
    assert code == 0 and f"warning: {folder} is gone, and with it the tokenizer's files" in said
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    stored = read_stored(msgspec.structs.replace(LLAMA, path=str(new)))
    assert {tensor.dtype for tensor in stored.values()} == {"BF16"}
