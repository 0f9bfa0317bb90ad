"""The count is the model: spec.count against the built model and torch's own counter."""

import tomllib
from pathlib import Path

import msgspec
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from meshwright.models import build_model, token_loss
from meshwright.spec import ZOO, ModelSpec, count_flops, count_parameters, parameter_shapes
from meshwright.spec.zoo import expand_model

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.toml"


def quickstart_model() -> ModelSpec:
    table = tomllib.loads(QUICKSTART.read_text(encoding="utf-8"))["model"]
    return msgspec.convert(expand_model(table), ModelSpec)


MODELS = {
    "4-layer 8B": msgspec.structs.replace(ZOO["llama3-8b"].spec, layers=4),
    "quickstart": quickstart_model(),
    "1B untied": ZOO["llama-1b-untied"].spec,
    "tied, all heads": ModelSpec(
        layers=3, d_model=48, heads=6, kv_heads=6, head_dim=8, feed_forward=100, vocabulary=71, tied_embeddings=True
    ),
    "one kv head, wide heads": ModelSpec(
        layers=2, d_model=64, heads=4, kv_heads=1, head_dim=32, feed_forward=96, vocabulary=33
    ),
}
each_model = pytest.mark.parametrize("spec", MODELS.values(), ids=MODELS.keys())


@each_model
def test_parameters_are_the_built_models(spec: ModelSpec) -> None:
    built = {name: tuple(parameter.shape) for name, parameter in build_model(spec).named_parameters()}
    assert list(built.items()) == list(parameter_shapes(spec).items())  # the order too
    assert sum(parameter.numel() for parameter in build_model(spec).parameters()) == count_parameters(spec)


@each_model
def test_the_parameters_are_the_whole_state(spec: ModelSpec) -> None:
    model = build_model(spec)
    assert list(model.state_dict()) == list(parameter_shapes(spec))
    assert not list(model.buffers())


@each_model
@pytest.mark.parametrize(("batch", "sequence"), [(1, 256), (2, 96)])
def test_flops_are_torchs(spec: ModelSpec, batch: int, sequence: int) -> None:
    model = build_model(spec)
    tokens = torch.zeros((batch, sequence), dtype=torch.int64, device="meta")
    counted = count_flops(spec, sequence)
    # On meta tensors torch decomposes attention into its two products over the full square (no causal half), and
    # does so for grouped queries too, so that nothing has to be left out. On CPU tensors it would count 0.
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(tokens)
    assert forward.get_total_flops() == pytest.approx(batch * counted.forward(), rel=0.01)
    with FlopCounterMode(display=False) as training:
        token_loss(model(tokens), tokens).backward()
    assert training.get_total_flops() == pytest.approx(batch * counted.training(), rel=0.01)


def test_flops_by_part() -> None:
    spec = MODELS["4-layer 8B"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        build_model(spec)(torch.zeros((1, 512), dtype=torch.int64, device="meta"))
    parts = {str(operation): flops for operation, flops in counter.get_flop_counts()["Global"].items()}
    counted = count_flops(spec, 512)
    assert parts["aten.bmm"] == spec.layers * counted.block_attention
    assert parts["aten.mm"] == spec.layers * counted.block_matmul + counted.head
