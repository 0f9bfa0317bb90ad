"""What a mixture of experts computes, in one process, against explicit math: routing, products, balance."""

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from mixtures import built
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from meshwright.models import Mixture
from meshwright.models.decoder import FeedForward
from meshwright.models.experts import grouped_feed_forward, grouped_product, keep_best_groups
from meshwright.parallel import move_biases
from meshwright.parallel.expert import mixtures_of
from meshwright.parallel.recompute import prepare_block
from meshwright.parallel.reduce import StepTotals
from meshwright.spec import Experts, Layout, ModelSpec, Recompute, SettingError
from meshwright.spec.huggingface import config_of_model

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="about GPUs")


def explicit(x: Tensor, mixture: Mixture) -> Tensor:
    """Tokens [N, D] through their experts, a token and an expert at a time."""
    experts, settings = mixture.experts, mixture.experts.settings
    rows: list[Tensor] = []
    for token in x:
        scores = torch.softmax(mixture.router.weight @ token, 0)
        chosen = sorted(range(settings.count), key=lambda n: -scores[n].item())[: settings.per_token]
        total = sum(scores[n] for n in chosen) if settings.normalised else 1.0
        parts = [
            scores[n]
            / total
            * settings.scale
            * (experts.down[n] @ (F.silu(experts.gate[n] @ token) * (experts.up[n] @ token)))
            for n in chosen
        ]
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows)


@pytest.mark.parametrize("normalised", [True, False])
def test_experts_equal_explicit_math(normalised: bool) -> None:
    _, model = built(normalised=normalised, scale=1.7)
    mixture = mixtures_of(model)[0]
    x = torch.randn(2, 7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = mixture.experts(x, mixture.router(x), None)
    wanted = explicit(x.flatten(0, 1), mixture).view_as(x)
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad(out.square().sum(), [*mixture.parameters()]) for out in (found, wanted)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_routing_by_groups_scores_and_bias_is_deepseeks() -> None:
    """DeepSeek-V3's attention is not built; its mixture is, and equals transformers' with every choice it makes."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=16,
        n_routed_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=12,
        n_group=4,
        topk_group=2,
        n_shared_experts=2,
        routed_scaling_factor=2.5,
    )
    config._experts_implementation = "eager"
    theirs: Any = DeepseekV3MoE(config)
    numbers = Experts(
        count=8, per_token=3, feed_forward=12, groups=4, groups_per_token=2, shared=2, scale=2.5, dense_layers=0
    )
    spec = ModelSpec(
        family="deepseek-v3",
        layers=1,
        d_model=16,
        heads=2,
        kv_heads=2,
        head_dim=8,
        feed_forward=8,
        vocabulary=31,
        experts=numbers,
    )
    ours = Mixture(spec, 0, FeedForward(spec, 24))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (*ours.parameters(), *ours.buffers()):
            tensor.normal_(generator=generator)
        theirs.gate.weight.copy_(ours.router.weight)
        theirs.gate.e_score_correction_bias.copy_(ours.router.bias)
        theirs.experts.gate_up_proj.copy_(torch.cat((ours.experts.gate, ours.experts.up), 1))
        theirs.experts.down_proj.copy_(ours.experts.down)
        assert isinstance(ours.shared, FeedForward) and ours.shared.gate is not None
        for name, layer in (("gate", ours.shared.gate), ("up", ours.shared.up), ("down", ours.shared.down)):
            getattr(theirs.shared_experts, f"{name}_proj").weight.copy_(layer.weight)
        x = torch.randn(2, 50, 16, generator=generator)
        found = ours.experts(x, ours.router(x), ours.router.bias) + ours.shared(x)
        wanted = theirs(x)
    assert (found - wanted).norm() < 1e-6 * wanted.norm()


def test_an_expert_that_nobody_chooses_has_a_gradient_of_zero() -> None:
    _, model = built()
    mixture = mixtures_of(model)[0]
    x = torch.randn(1, 5, 12, dtype=torch.float64)
    logits = torch.zeros(1, 5, 6, dtype=torch.float64)
    logits[..., :2] = 5.0
    mixture.experts(x, logits, None).sum().backward()
    gradient = mixture.experts.down.grad
    assert gradient is not None
    assert (gradient[2:] == 0).all() and (gradient[:2] != 0).any()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_grouped_products_are_those_of_each_expert_alone(device: str) -> None:
    """A GPU's way to compute experts, one of which has no rows; on a CPU torch has the same operator."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows = torch.randn(12, 16, generator=generator).to(device, dtype).requires_grad_()
    matrices = torch.randn(4, 24, 16, generator=generator).to(device, dtype).requires_grad_()
    counts = torch.tensor([5, 0, 4, 3], device=device)
    found = grouped_product(rows, matrices, counts.cumsum(0).to(torch.int32))
    parts = zip(rows.split(counts.tolist()), matrices.unbind(), strict=True)
    wanted = torch.cat([part @ matrix.T for part, matrix in parts])
    torch.testing.assert_close(found, wanted)
    weights = torch.randn(12, 24, generator=generator).to(device, dtype)
    gradients = [torch.autograd.grad((out * weights).sum(), [rows, matrices]) for out in (found, wanted)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@needs_gpu
def test_experts_on_a_gpu_equal_those_on_a_cpu() -> None:
    """In bf16, by grouped products, as far as bf16 rounds."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 32, generator=generator)
    stacks = [torch.randn(4, *shape, generator=generator) / 6 for shape in ((48, 32), (48, 32), (32, 48))]
    counts = torch.tensor([20, 0, 30, 14])
    exact = grouped_feed_forward(rows, counts, *stacks)
    there = [tensor.to("cuda", torch.bfloat16) for tensor in (rows, *stacks)]
    rounded = grouped_feed_forward(there[0], counts.cuda(), *there[1:])
    assert (rounded.float().cpu() - exact).norm() < 0.02 * exact.norm()


def test_groups_are_judged_by_their_two_best() -> None:
    ranked = torch.tensor([0.9, 0.0, 0.5, 0.5, 0.6, 0.2])
    kept = keep_best_groups(ranked, 3, 1)
    assert kept.tolist() == [-torch.inf, -torch.inf, 0.5, 0.5, -torch.inf, -torch.inf]


def test_a_bias_decides_who_is_chosen_and_not_with_what_weight() -> None:
    _, model = built(bias_rate=0.1, normalised=False)
    experts = mixtures_of(model)[0].experts
    logits = torch.tensor([[[2.0, 1.0, 0.0, -1.0, -2.0, -3.0]]])
    plain, moved = (experts.choose(logits, bias) for bias in (torch.zeros(6), torch.tensor([0, 0, 0, 0, 0, 9.0])))
    assert plain.experts.tolist() == [[[0, 1]]] and moved.experts.tolist() == [[[5, 0]]]
    assert moved.weights[0, 0, 0] == logits.softmax(-1)[0, 0, 5]


def router_gradient(tokens: Tensor, balance_loss: float, *, recompute: bool) -> tuple[Tensor, Mixture, Tensor]:
    """A router's gradient with a balance loss beside some other loss, its mixture, and what the router was given."""
    _, model = built(balance_loss=balance_loss)
    mixture, block = mixtures_of(model)[0], model.blocks["0"]
    given: list[Tensor] = []
    mixture.router.register_forward_hook(lambda _module, inputs, _output: given.append(inputs[0].detach()))
    if recompute:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    with torch.no_grad():
        model(tokens)  # looking on counts nothing
    model(tokens).square().sum().backward()
    gradient = mixture.router.weight.grad
    assert gradient is not None
    return gradient, mixture, given[0]


@pytest.mark.parametrize("recompute", [False, True])
def test_the_balance_loss_is_its_definition(recompute: bool) -> None:
    """Gradients with it less those without are those of the sum that the paper writes; counted once, whoever looks."""
    coefficient = 0.7
    tokens = torch.randint(31, (3, 9), generator=torch.Generator().manual_seed(2))
    plain, _, _ = router_gradient(tokens, 0.0, recompute=recompute)
    found, mixture, normed = router_gradient(tokens, coefficient, recompute=recompute)
    taken = mixture.experts.load.take(mixture.router.weight)
    assert taken[1:].sum() == 2 * tokens.numel()
    assert not mixture.experts.load.take(mixture.router.weight).any()

    weight = mixture.router.weight.detach().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for sequence in normed:
        shares = torch.softmax(sequence @ weight.T, -1)
        for number in range(6):
            uses = sum(number in row.topk(2).indices.tolist() for row in shares)
            total = total + 6 / (2 * 9) * uses * shares[:, number].sum() / 9
    (coefficient * total / 3).backward()
    torch.testing.assert_close(found - plain, weight.grad)
    assert float(taken[0]) == pytest.approx(coefficient * float(total.detach()) / 3, rel=1e-6)


# torch's own: dynamo looks at .grad of an activation, and says that it was given a policy for recompute.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_blocks_compile_around_their_experts(recompute: Recompute) -> None:
    """Without a break in any graph, and with the same gradients."""
    compile_ = torch.compile
    tokens = torch.randint(31, (2, 8), generator=torch.Generator().manual_seed(4))
    gradients: list[list[Tensor]] = []
    for compiled in (False, True):
        _, model = built(shared=1, balance_loss=0.1)
        with mock.patch.object(torch, "compile", partial(compile_, backend="aot_eager", fullgraph=True)):
            for index, block in enumerate(model.blocks.values()):
                prepare_block(block, Layout(recompute=recompute), index, compiled=compiled)
        model(tokens).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(model.parameters()))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_bias_goes_against_its_load_in_the_largest_batch() -> None:
    """By a sign that is right where fp32 rounds the sum of all choices."""
    _, model = built(bias_rate=0.5)
    bias = mixtures_of(model)[0].router.bias
    assert bias is not None
    before = bias.clone()
    counts = [5_000_001.0, *[5_000_000.0] * 5]
    move_biases(model, StepTotals(torch.zeros(3), torch.tensor([[0.0, *counts]])))
    assert (bias - before).tolist() == [-0.5, *[0.5] * 5]


def test_a_bias_that_transformers_cannot_say_is_refused() -> None:
    with pytest.raises(SettingError, match="no bias to choose experts by"):
        config_of_model(built(bias_rate=0.1)[0])
