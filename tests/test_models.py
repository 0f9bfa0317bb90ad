"""The decoder against explicit math, its initial weights, its loss and its sampling."""

import math
import subprocess
import sys
from typing import Any

import msgspec
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from meshwright.models import (
    build_model,
    build_view,
    generate,
    initial_tensor,
    initialize_,
    rotary_tables,
    token_loss,
)
from meshwright.models.attention import first_seen, tile_mask
from meshwright.models.decoder import Decoder, rotate
from meshwright.spec import BUILT_FAMILIES, FamilyName, ModelSpec, parameter_shapes

GROUPED = ModelSpec(layers=2, d_model=24, heads=4, kv_heads=2, head_dim=6, feed_forward=40, vocabulary=31)
TIED = ModelSpec(
    layers=2, d_model=24, heads=3, kv_heads=3, head_dim=8, feed_forward=40, vocabulary=31, tied_embeddings=True
)
each_spec = pytest.mark.parametrize("spec", [GROUPED, TIED], ids=["grouped", "tied"])


def built(spec: ModelSpec, seed: int = 0) -> Decoder:
    model = build_model(spec, "cpu")
    initialize_(model, spec, seed)
    return model


def some_tokens(spec: ModelSpec, batch: int = 2, sequence: int = 13) -> Tensor:
    return torch.randint(spec.vocabulary, (batch, sequence), generator=torch.Generator().manual_seed(5))


def reference_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def reference_turn(x: Tensor, theta: float) -> Tensor:
    """x [S, E] as E/2 complex numbers, each turned by position x theta^(-2i/E)."""
    sequence, width = x.shape
    pairs = torch.complex(x[:, : width // 2], x[:, width // 2 :])
    angles = torch.tensor(
        [[p * theta ** (-2 * i / width) for i in range(width // 2)] for p in range(sequence)], dtype=torch.float64
    )
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


def reference_attention(x: Tensor, weights: dict[str, Tensor], spec: ModelSpec) -> Tensor:
    """x [S, D]; one head at a time, one position at a time."""
    query, key, value = (x @ weights[f"attention.{name}.weight"].T for name in ("query", "key", "value"))
    heads: list[Tensor] = []
    for head in range(spec.heads):
        group = head // (spec.heads // spec.kv_heads)
        own, shared = (slice(n * spec.head_dim, (n + 1) * spec.head_dim) for n in (head, group))
        q, k = reference_turn(query[:, own], spec.rope_theta), reference_turn(key[:, shared], spec.rope_theta)
        rows = [
            torch.softmax(k[: p + 1] @ q[p] / math.sqrt(spec.head_dim), 0) @ value[: p + 1, shared]
            for p in range(len(x))
        ]
        heads.append(torch.stack(rows))
    return torch.cat(heads, dim=-1) @ weights["attention.output.weight"].T


def reference_logits(tokens: Tensor, weights: dict[str, Tensor], spec: ModelSpec) -> Tensor:
    """tokens [S] to logits [S, V] in fp64."""
    x = weights["embedding.weight"][tokens]
    for layer in range(spec.layers):
        prefix = f"blocks.{layer}."
        block = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        normed = reference_norm(x, block["attention_norm.weight"], spec.norm_epsilon)
        x = x + reference_attention(normed, block, spec)
        normed = reference_norm(x, block["feed_forward_norm.weight"], spec.norm_epsilon)
        gate, up = (normed @ block[f"feed_forward.{name}.weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + (-gate).exp()) * up) @ block["feed_forward.down.weight"].T
    x = reference_norm(x, weights["norm.weight"], spec.norm_epsilon)
    return x @ weights["embedding.weight" if spec.tied_embeddings else "head.weight"].T


@each_spec
def test_equals_explicit_math(spec: ModelSpec) -> None:
    model, tokens = built(spec), some_tokens(spec)
    with torch.no_grad():
        # Far from the initial values, at which attention is all but uniform and norms do nothing.
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            parameter.add_(noise, alpha=0.1)
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    expected = torch.stack([reference_logits(row, weights, spec) for row in tokens])
    # In fp64 too, so that only the rotation's tables, fp32 always, are less exact than the reference.
    logits = model.double()(tokens)
    assert (logits - expected).norm() <= 1e-6 * expected.norm()

    F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum").backward()
    F.cross_entropy(expected.flatten(0, 1), tokens.flatten(), reduction="sum").backward()
    for name, parameter in model.named_parameters():
        gradient, wanted = parameter.grad, weights[name].grad
        assert gradient is not None
        assert wanted is not None
        assert (gradient - wanted).norm() <= 1e-6 * wanted.norm(), name


@each_spec
def test_a_later_token_never_changes_earlier_logits(spec: ModelSpec) -> None:
    model, tokens = built(spec), some_tokens(spec)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % spec.vocabulary
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[:, :7], before[:, :7], rtol=0, atol=0)
    assert (after[:, 7:] != before[:, 7:]).any(dim=-1).all()


def distinct(family: FamilyName, **numbers: Any) -> Decoder:
    """A model whose weights are far from the initial ones, at which attention is all but uniform."""
    more: dict[str, Any] = {"max_positions": 24} if family == "gpt2" else {}
    spec = ModelSpec(
        family=family,
        layers=2,
        d_model=24,
        heads=4,
        kv_heads=2,
        head_dim=6,
        feed_forward=40,
        vocabulary=31,
        **more,
        **numbers,
    )
    model = built(spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.3)
    return model


@pytest.mark.parametrize("sequence", [128, 200, 512])
@pytest.mark.parametrize("window", [0, 5, 130, 300])
@pytest.mark.parametrize("packed", [False, True])
def test_tiles_of_a_mask_are_those_that_asking_every_pair_finds(sequence: int, window: int, packed: bool) -> None:
    documents = (torch.arange(sequence)[None] * torch.tensor([[1], [3]]) // 100).int() if packed else None

    def visible(batch: Any, _head: Any, query: Any, key: Any) -> Any:
        seen = (query >= key) & (query - key < (window or sequence))
        return seen if documents is None else seen & (documents[batch, query] == documents[batch, key])

    found = tile_mask(first_seen(sequence, documents, window, torch.device("cpu")))
    wanted = create_block_mask(visible, 2 if packed else None, None, sequence, sequence, device="cpu")
    assert torch.equal(found.to_dense(), wanted.to_dense())
    assert found.full_kv_num_blocks is not None and wanted.full_kv_num_blocks is not None
    assert torch.equal(found.full_kv_num_blocks, wanted.full_kv_num_blocks)
    places = torch.arange(sequence)
    for batch in range(2 if packed else 1):
        for query in places:
            mask = found.mask_mod(torch.tensor(batch), torch.tensor(0), query, places)
            assert torch.equal(mask, visible(torch.tensor(batch), 0, query, places))


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("family", BUILT_FAMILIES)
def test_documents_of_a_sample_are_as_if_each_stood_alone(family: FamilyName, window: int) -> None:
    """Neither attention nor positions reach over a document's edge; some documents are longer than the window."""
    model = distinct(family, attention_window=window)
    tokens = some_tokens(model.spec, sequence=19)
    lengths = [[7, 1, 9, 2], [3, 16]]
    documents = torch.tensor(
        [[number for number, length in enumerate(row) for _ in range(length)] for row in lengths], dtype=torch.int32
    )
    alone = torch.cat(
        [
            torch.cat([model(part[None]) for part in row.split(parts)], dim=1)
            for row, parts in zip(tokens, lengths, strict=True)
        ]
    )
    view = build_view(model.spec, tokens.shape[1], documents, tokens.device)
    torch.testing.assert_close(model(tokens, view), alone)
    # Without being told, later documents see earlier ones.
    assert (model(tokens)[0, 7:] - alone[0, 7:]).abs().max() > 0.01


@pytest.mark.parametrize("family", BUILT_FAMILIES)
def test_a_window_ends_what_a_token_sees(family: FamilyName) -> None:
    """Through two layers of window 4, a token's logits depend on itself and the 6 before."""
    model = distinct(family, attention_window=4)
    tokens = some_tokens(model.spec, sequence=19)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % model.spec.vocabulary
    differs = (model(tokens) != model(changed)).any(dim=-1).any(dim=0)
    assert differs.nonzero().flatten().tolist() == list(range(5, 12))


@each_spec
def test_initial_weights_are_a_function_of_name_and_seed(spec: ModelSpec) -> None:
    whole = dict(built(spec, seed=3).named_parameters())
    torch.manual_seed(99)  # the global generator has no part in it
    for name, shape in reversed(parameter_shapes(spec).items()):
        again = initial_tensor(name, shape, spec, 3, "cpu")
        assert again.dtype == torch.float32 and tuple(again.shape) == shape
        torch.testing.assert_close(again, whole[name].detach(), rtol=0, atol=0)


def test_initial_weights_differ_by_name_and_seed() -> None:
    first, second = (f"blocks.{layer}.attention.query.weight" for layer in (0, 1))
    shape = parameter_shapes(GROUPED)[first]
    drawn = [initial_tensor(*args, "cpu") for args in ((first, shape, GROUPED, 0), (second, shape, GROUPED, 0))]
    drawn += [initial_tensor(first, shape, GROUPED, seed, "cpu") for seed in (1, -1)]
    for index, one in enumerate(drawn):
        assert all(not torch.equal(one, other) for other in drawn[index + 1 :])


def test_initial_weights_are_equal_in_another_process() -> None:
    code = (
        "from meshwright.models import initial_tensor; from meshwright.spec import ModelSpec;"
        f"import msgspec; spec = msgspec.json.decode({msgspec.json.encode(GROUPED)!r}, type=ModelSpec);"
        "print(initial_tensor('head.weight', (31, 24), spec, 0, 'cpu').double().sum().item())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(printed) == initial_tensor("head.weight", (31, 24), GROUPED, 0, "cpu").double().sum().item()


def test_initial_spread() -> None:
    spec = ModelSpec(layers=8, d_model=4096, heads=32, kv_heads=8, head_dim=128, feed_forward=64, vocabulary=64)

    def spread(name: str) -> float:
        return initial_tensor(name, (64, 4096), spec, 0, "cpu").std().item()

    expected = math.sqrt(2 / (5 * 4096))
    for name in ("blocks.1.attention.query.weight", "embedding.weight", "head.weight"):
        assert spread(name) == pytest.approx(expected, rel=0.02)
    for name in ("blocks.1.feed_forward.down.weight", "blocks.7.attention.output.weight"):
        assert spread(name) == pytest.approx(expected / 4, rel=0.02)
    assert initial_tensor("blocks.1.attention_norm.weight", (8,), spec, 0, "cpu").tolist() == [1.0] * 8


def test_loss_is_a_sum_in_fp32() -> None:
    logits = torch.zeros(2, 3, 7, dtype=torch.bfloat16)
    loss = token_loss(logits, torch.zeros(2, 3, dtype=torch.int64))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(6 * math.log(7))


def test_microbatches_add_up_to_the_batch() -> None:
    model, tokens = built(GROUPED), some_tokens(GROUPED, batch=4)
    whole = token_loss(model(tokens), tokens)
    parts = [token_loss(model(part), part) for part in tokens.split(1)]
    torch.testing.assert_close(torch.stack(parts).sum(), whole, rtol=1e-6, atol=0)


def test_rotation_of_bf16_rounds_once() -> None:
    cos, sin = rotary_tables(torch.arange(4000, 4008), GROUPED)
    x = torch.randn(1, 8, 2, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    turned = rotate(x, cos, sin)
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(turned, rotate(x.float(), cos, sin).bfloat16(), rtol=0, atol=0)


def test_bf16_parameters_run() -> None:
    model, tokens = built(GROUPED), some_tokens(GROUPED)
    exact = model(tokens)
    rounded = model.bfloat16()(tokens)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.02 * exact.norm()


# torch's own: dynamo looks at .grad of an activation.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_all_blocks_share_one_compiled_graph() -> None:
    """Compiled one by one, equal blocks must not pay one compilation each, nor break into several graphs."""
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, _: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    model, tokens = built(GROUPED), some_tokens(GROUPED)
    expected = model(tokens)
    for block in model.blocks.values():
        block.compile(backend=record, fullgraph=True)
    torch.testing.assert_close(model(tokens), expected)
    assert len(graphs) == 1
    assert list(dict(model.named_parameters())) == list(parameter_shapes(GROUPED))


def test_generation() -> None:
    model, tokens = built(GROUPED), some_tokens(GROUPED)
    one, two = (generate(model, tokens, 6, temperature=1.0, seed=4) for _ in range(2))
    assert one.shape == (2, 19) and torch.equal(one, two) and torch.equal(one[:, :13], tokens)
    assert not torch.equal(one, generate(model, tokens, 6, temperature=1.0, seed=5))
    likeliest = generate(model, tokens, 2, temperature=0.0)
    assert torch.equal(likeliest[:, 13], model(tokens)[:, -1].argmax(-1))
    windowed = generate(model, tokens, 1, temperature=0.0, window=5)
    assert torch.equal(windowed[:, 13], model(tokens[:, -5:])[:, -1].argmax(-1))
