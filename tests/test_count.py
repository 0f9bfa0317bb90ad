"""The count is the model: spec.count against the built model and torch's own counter."""

import tomllib
from math import floor, log10, prod
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from meshwright.models import build_model, token_loss
from meshwright.spec import (
    ZOO,
    FamilyName,
    ModelSpec,
    NamedModel,
    SettingError,
    check_built,
    count_flops,
    count_parameters,
    parameter_shapes,
)
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


def of_family(family: FamilyName, **numbers: Any) -> ModelSpec:
    more: dict[str, Any] = {"kv_heads": 2} | numbers
    return ModelSpec(family=family, layers=3, d_model=64, heads=4, head_dim=16, feed_forward=96, vocabulary=71, **more)


MODELS |= {
    "mistral": of_family("mistral", attention_window=32),
    "qwen3": of_family("qwen3", tied_embeddings=True),
    "gpt2": of_family("gpt2", kv_heads=4, max_positions=256, tied_embeddings=True),
    "gpt2, untied": of_family("gpt2", kv_heads=4, max_positions=256),
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


each_named = pytest.mark.parametrize("named", ZOO.values(), ids=ZOO.keys())


@each_named
def test_named_models_have_their_published_parameters(named: NamedModel) -> None:
    """Within half a unit of the last digit that was published."""
    unit = 10 ** (floor(log10(named.published_parameters)) + 1 - named.published_digits)
    assert abs(count_parameters(named.spec) - named.published_parameters) <= unit / 2


@each_named
def test_and_those_that_are_built_have_them_in_fact(named: NamedModel) -> None:
    if not named.spec.parts.built:
        with pytest.raises(SettingError, match="training it is not built yet"):
            check_built(named.spec)
        return
    # Blocks are alike: two of them stand for 126.
    spec = msgspec.structs.replace(named.spec, layers=2)
    built = {name: tuple(parameter.shape) for name, parameter in build_model(spec).named_parameters()}
    assert list(built.items()) == list(parameter_shapes(spec).items())
    block = sum(prod(shape) for name, shape in built.items() if name.startswith("blocks.1."))
    whole = sum(prod(shape) for shape in built.values()) + (named.spec.layers - 2) * block
    assert whole == count_parameters(named.spec)


def test_experts_that_a_token_does_not_use_cost_no_flops() -> None:
    """Of 8 experts a token runs through 2: as many FLOPs as a dense part twice as wide, and the router's."""
    mixtral = ZOO["mixtral-8x7b"].spec
    dense = msgspec.structs.replace(
        mixtral, family="llama", experts=None, feed_forward=2 * mixtral.feed_forward, layers=mixtral.layers
    )
    router = 2 * 512 * mixtral.layers * mixtral.d_model * 8
    assert count_flops(mixtral, 512).forward() == count_flops(dense, 512).forward() + router


@pytest.mark.parametrize(
    ("name", "active"),
    [
        # arXiv:2401.04088: 13B; arXiv:2505.09388: 3B and 22B; arXiv:2412.19437: 37B.
        ("mixtral-8x7b", 13e9),
        ("qwen3-30b-a3b", 3e9),
        ("qwen3-235b-a22b", 22e9),
        ("deepseek-v3", 37e9),
    ],
)
def test_active_parameters_are_the_published_ones(name: str, active: float) -> None:
    """What 6 N of a token's FLOPs, attention apart, come from; the embedding, which costs none, is counted in them."""
    model = ZOO[name].spec
    flops = count_flops(model, 1)
    matrices = (flops.layers * flops.block_matmul + flops.head) / 2
    assert matrices + model.vocabulary * model.d_model == pytest.approx(active, rel=0.13)


def test_flops_by_part() -> None:
    spec = MODELS["4-layer 8B"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        build_model(spec)(torch.zeros((1, 512), dtype=torch.int64, device="meta"))
    parts = {str(operation): flops for operation, flops in counter.get_flop_counts()["Global"].items()}
    counted = count_flops(spec, 512)
    assert parts["aten.bmm"] == spec.layers * counted.block_attention
    assert parts["aten.mm"] == spec.layers * counted.block_matmul + counted.head
