"""Hugging Face models in and out, against transformers itself: logits, tensors byte for byte, counts."""

from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hubs import MODELS, open_saved, random_model, save_random
from jobs import tiny_job
from ranks import run_ranks
from training import new_run, train_layout

from meshwright.checkpoint import convert_run, huggingface, load_pretrained, read_model_weights, save_checkpoint
from meshwright.data import open_stream
from meshwright.models import Decoder, build_model, initialize_
from meshwright.parallel import build_mesh, build_parallel_model, copy_whole, start_distributed, stop_distributed
from meshwright.record import RunFolder
from meshwright.spec import BUILT_FAMILIES, ZOO, FamilyName, Job, ModelSpec, count_parameters
from meshwright.spec.huggingface import DERIVED, FORMATS, config_of_model, model_of_config
from meshwright.spec.pretrained import CONFIG, INDEX_FILE, read_config, read_stored
from meshwright.train.optimizer import build_optimizer

# Where transformers takes a null for a number that follows from others.
NULLABLE: dict[FamilyName, tuple[str, ...]] = {
    "llama": ("num_key_value_heads", "head_dim"),
    "mistral": ("head_dim",),
    "qwen3": ("num_key_value_heads",),
    "gpt2": ("n_inner",),
    "mixtral": ("head_dim",),
    "qwen3-moe": (),
    "deepseek-v3": ("num_key_value_heads",),
}
each_model = pytest.mark.parametrize("name", MODELS)
LAYOUTS: list[dict[str, int]] = [{}, {"shard": 3}, {"replica": 2, "shard": 2}, {"shard": 2, "tensor": 2}]
DENSE = ["llama, stretched and tied", "mistral", "qwen3", "gpt2, narrow and untied"]
MIXTURES = ["mixtral", "qwen3-moe, not normalised"]
# Each rank has whole experts, parts of all of them, or parts of some.
MIXTURE_LAYOUTS: list[dict[str, int]] = [
    {"shard": 3, "expert": 3},
    {"replica": 2, "shard": 2},
    {"shard": 2, "tensor": 2, "expert": 2},
]
TOKENS = torch.randint(0, 271, (2, 24), generator=torch.Generator().manual_seed(1))


def job_from(model: Path, folder: Path, **layout: int) -> Job:
    """A job that starts from a folder's weights."""
    axes = {axis: size for axis, size in layout.items() if axis != "expert"}
    job = tiny_job(folder, processes=torch.Size(axes.values()).numel(), layout=axes, data={"global_batch": 12})
    # tiny_job's own numbers would stand beside the folder's.
    model_spec = msgspec.structs.replace(model_of_config(read_config(model)), path=str(model))
    divided = msgspec.structs.replace(job.layout, expert=layout.get("expert", 1))
    return msgspec.structs.replace(job, model=model_spec, layout=divided)


def save_as_read(job: Job, run: RunFolder) -> tuple[int, int, int]:
    """A rank that loads its part of job.model.path and saves it; elements of the largest slice, of all, and held."""
    torch.set_num_threads(1)
    device = start_distributed(job.cluster)
    model = build_parallel_model(job, build_mesh(job.layout, device), device)
    taken: list[int] = []
    read = huggingface.read_slice

    def reading(*arguments: Any) -> torch.Tensor:
        part = read(*arguments)
        taken.append(part.numel())
        return part

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface, "read_slice", reading)
        load_pretrained(model, job.model)
    held = sum(huggingface.local_part(parameter.detach())[0].numel() for parameter in model.parameters())
    save_checkpoint(run, 1, model, build_optimizer(model, job.optimizer), job.layout, corpus="", keep=0)
    stop_distributed()
    return max(taken), sum(taken), held


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        made = model(TOKENS)
    return made if isinstance(made, torch.Tensor) else made.logits


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference, relative to the largest logit."""
    return float((one - other).abs().max() / other.abs().max())


def contents(folder: Path, spec: ModelSpec) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a folder: its kind, its shape and its bytes."""
    stored = read_stored(msgspec.structs.replace(spec, path=str(folder)))
    return {
        name: (tensor.dtype, tensor.shape, tensor.file.read_bytes()[tensor.begin : tensor.end])
        for name, tensor in stored.items()
    }


@each_model
@pytest.mark.parametrize("files", ["5GB", "20KB"], ids=["one file", "many files"])
def test_logits_of_a_folder_are_transformers(name: str, files: str, tmp_path: Path) -> None:
    theirs = save_random(name, tmp_path / "hf", files=files)
    assert (tmp_path / "hf" / INDEX_FILE).is_file() == (files == "20KB")
    spec = job_from(tmp_path / "hf", tmp_path).model
    ours = build_model(spec, device="cpu")
    load_pretrained(ours, spec)
    assert difference(logits_of(ours), logits_of(theirs)) < 1e-5


def randomly_filled(spec: ModelSpec) -> Decoder:
    """A model whose norms and biases are random too."""
    model = build_model(spec, device="cpu")
    initialize_(model, spec, seed=5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) / 10
    return model


@each_model
@pytest.mark.parametrize("file_bytes", [5 * 10**9, 20_000], ids=["one file", "many files"])
def test_logits_of_a_converted_run_are_ours(name: str, file_bytes: int, tmp_path: Path) -> None:
    spec = model_of_config(random_model(name).config.to_dict())
    job = msgspec.structs.replace(tiny_job(tmp_path), model=spec)
    ours = randomly_filled(spec)
    run, _ = new_run(job)
    run_ranks(1, save_model, job, run, ours)
    out = convert_run(run, job, None, None, file_bytes)
    assert out == run.path / "hf-step-1"
    assert (out / INDEX_FILE).is_file() == (file_bytes == 20_000)
    assert difference(logits_of(open_saved(out)), logits_of(ours)) < 1e-5
    assert model_of_config(read_config(out)) == spec


def save_model(job: Job, run: RunFolder, model: Decoder) -> None:
    device = start_distributed(job.cluster)
    held = build_parallel_model(job, build_mesh(job.layout, device), device)
    with torch.no_grad():
        for name, parameter in held.named_parameters():
            copy_whole(parameter, model.get_parameter(name))
    save_checkpoint(run, 1, held, build_optimizer(held, job.optimizer), job.layout, corpus="", keep=0)
    stop_distributed()


@pytest.mark.parametrize(
    ("name", "layout"),
    [*product(DENSE, LAYOUTS), *product(MIXTURES, MIXTURE_LAYOUTS)],
    ids=lambda choice: choice if isinstance(choice, str) else "-".join(f"{k}{v}" for k, v in choice.items()) or "1",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_round_trip_is_byte_equal(name: str, layout: dict[str, int], dtype: torch.dtype, tmp_path: Path) -> None:
    save_random(name, tmp_path / "hf", dtype=dtype, files="50KB")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    job = job_from(tmp_path / "hf", tmp_path, **layout)
    run, _ = new_run(job)
    seen = run_ranks(job.layout.world_size, save_as_read, job, run)
    out = convert_run(run, job, tmp_path / "out", None)
    before, after = contents(tmp_path / "hf", job.model), contents(out, job.model)
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == []
    assert model_of_config(read_config(out)) == msgspec.structs.replace(job.model, path="")
    assert (out / "tokenizer.json").read_text() == "{}"
    # No rank read more than it holds, which is its share and a few whole norms, nor more than a part at a time.
    parts = layout.get("shard", 1) * layout.get("tensor", 1)
    for largest, read, held in seen:
        assert read == held <= count_parameters(job.model) / parts + 1500
        assert largest <= -(-job.model.vocabulary // parts) * job.model.d_model


def test_transformers_opens_what_it_saved_again(tmp_path: Path) -> None:
    """The whole way: their folder, trained on by no step, back, and opened by them."""
    theirs = save_random("gpt2", tmp_path / "hf")
    job = job_from(tmp_path / "hf", tmp_path)
    run, _ = new_run(job)
    run_ranks(1, save_as_read, job, run)
    assert torch.equal(logits_of(open_saved(convert_run(run, job, None, None))), logits_of(theirs))
    spec = msgspec.structs.replace(job.model, path="")
    again = build_model(spec, device="cpu")
    read_model_weights(run.checkpoint(1), again)
    assert difference(logits_of(again), logits_of(theirs)) < 1e-5


# --- Numbers ---------------------------------------------------------------------------------------------------------


def transformers_model(spec: ModelSpec) -> Any:
    """transformers' model of our numbers, on the meta device, through a config.json."""
    import transformers

    config = config_of_model(spec)
    kind = getattr(transformers, config["architectures"][0])
    with torch.device("meta"):
        return kind(kind.config_class.from_dict(config))


@pytest.mark.parametrize("name", ZOO)
def test_the_zoos_numbers_are_the_same_there_and_back(name: str, tmp_path: Path) -> None:
    import transformers

    spec = ZOO[name].spec
    (tmp_path / CONFIG).write_bytes(msgspec.json.encode(config_of_model(spec)))
    assert model_of_config(read_config(tmp_path)) == msgspec.structs.replace(spec, name="custom")
    # As transformers writes it after it has read ours.
    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert model_of_config(read_config(tmp_path / "again")) == msgspec.structs.replace(spec, name="custom")


@pytest.mark.parametrize("null", [False, True], ids=["left out", "null"])
@pytest.mark.parametrize("family", FORMATS)
def test_what_a_config_leaves_out_is_what_transformers_takes(family: FamilyName, null: bool) -> None:
    import transformers

    form = FORMATS[family]
    needed = {*form.numbers.values(), *form.experts.values(), *form.latent.values()} - form.omitted.keys()
    given = {key: 8 for key in needed if key not in DERIVED} | {"model_type": form.model_type, "vocab_size": 60000}
    given |= {key: None for key in DERIVED if null and key in form.numbers.values() and key in NULLABLE[family]}
    theirs = getattr(transformers, form.architecture).config_class.from_dict(given).to_dict()
    ours = model_of_config(given)
    assert ours == msgspec.structs.replace(model_of_config(theirs), max_positions=ours.max_positions)


@pytest.mark.parametrize("name", ZOO)
def test_the_zoos_counts_are_transformers(name: str) -> None:
    spec = ZOO[name].spec
    model = transformers_model(spec)
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(spec)


def test_every_family_has_a_model_here() -> None:
    families: set[FamilyName] = {model_of_config(random_model(name).config.to_dict()).family for name in MODELS}
    assert families == set(BUILT_FAMILIES)


def test_training_begins_where_the_folder_ended(tmp_path: Path) -> None:
    """The first step's loss, over two ranks, is that of transformers on the same samples."""
    theirs = save_random("qwen3", tmp_path / "hf")
    job = job_from(tmp_path / "hf", tmp_path, shard=2)
    tokens, targets, _ = open_stream(job).batch(0, 0, job.data.global_batch)
    with torch.no_grad():
        logits = theirs(torch.from_numpy(tokens)).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).flatten())
    metrics, _, _ = train_layout(job)
    assert metrics[0].loss == pytest.approx(expected.item(), rel=1e-5)
