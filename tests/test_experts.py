"""Mixtures of experts: routing and balance against explicit math, layouts against one process, and what is refused.

Which experts a token goes to is a jump, not a slope: where two of them stand equal, round-off decides, and a layout
could differ from one process without being wrong. So the inputs here keep the last that is chosen clear of the first
that is not, in every token of every step, and a test holds them to it.
"""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from foreign import Foreign
from jobs import tiny_job
from ranks import run_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from training import Tensors, new_attempt, new_run, train_layout, train_rank, weights
from verifying import Fault, References, assert_agrees, verdict_of

from meshwright.explain.verification import Cause
from meshwright.launch.shrink import write_text
from meshwright.models import Decoder, Experts, Mixture, build_model, initialize_
from meshwright.models.decoder import FeedForward
from meshwright.models.experts import Choice, grouped_feed_forward, grouped_product, keep_best_groups
from meshwright.parallel import build_mesh, build_parallel_model, expert, start_distributed, stop_distributed
from meshwright.parallel.expert import mixtures_of
from meshwright.parallel.recompute import prepare_block
from meshwright.parallel.units import check_units
from meshwright.record import Metrics, RunFolder, Step, read_events, read_metrics
from meshwright.spec import AXES, Job, Layout, ModelSpec, Recompute, SettingError
from meshwright.spec.huggingface import config_of_model
from meshwright.spec.model import Experts as Numbers
from meshwright.train import loop
from meshwright.train.progress import describe
from meshwright.verify.alone import train_alone

# Of the scores that a router ranks, relative: a thousand times what fp32 rounds.
LEAST_MARGIN = 1e-4
BALANCED = {"balance_loss": 0.3, "bias_rate": 0.003}
# Name to family, what its experts have besides, and a seed that keeps the margin.
MIXTURES: dict[str, tuple[str, dict[str, Any], int]] = {
    "mixtral": ("mixtral", BALANCED, 48),
    # Of a width that no size of an axis divides, so that matrices are split along the other.
    "qwen3-moe": ("qwen3-moe", {"per_token": 3, "normalised": False, "balance_loss": 0.3, "feed_forward": 21}, 48),
    # As DeepSeek-V3 has them, beside other attention.
    "shared": (
        "mixtral",
        BALANCED | {"shared": 2, "dense_layers": 1, "groups": 4, "groups_per_token": 2, "scale": 1.5},
        2,
    ),
}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="about GPUs")
each_mixture = pytest.mark.parametrize("mixture", MIXTURES)


def mixture_job(folder: Path, mixture: str, *, accumulation: int = 1, **sections: dict[str, Any]) -> Job:
    """A job on the smallest mixture and batch that the layouts here divide."""
    family, experts, seed = MIXTURES[mixture]
    layout = sections.pop("layout", {})
    data_size = layout.get("replica", 1) * layout.get("shard", 1)
    table: dict[str, dict[str, Any]] = {
        "run": {"folder": str(folder / "runs"), "seed": seed},
        "model": {
            "family": family,
            "d_model": 32,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 8,
            "feed_forward": 36,
            "vocabulary": 263,
            "experts": {"count": 8, "per_token": 2, "feed_forward": 24} | experts,
        },
        "data": {"sequence": 16, "global_batch": 8},
        "layout": layout | {"microbatch": 8 // (data_size * accumulation)},
    }
    for name, section in sections.items():
        table[name] = table.get(name, {}) | section
    ranks = prod(layout.get(axis, 1) for axis in AXES)
    return tiny_job(folder, processes=ranks, **table)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where text, tokens and references are, for all cases."""
    folder = tmp_path_factory.mktemp("experts")
    write_text(folder)
    return folder


@pytest.fixture(scope="module")
def references(folder: Path) -> References:
    return References(folder)


@pytest.fixture
def compare(folder: Path, references: References, tmp_path: Path) -> Callable[..., None]:
    """Run a layout of a mixture and fail if it differs from one process."""

    def run(mixture: str, **settings: Any) -> None:
        settings["run"] = {"folder": str(tmp_path), "seed": MIXTURES[mixture][2]} | settings.get("run", {})
        assert_agrees(verdict_of(mixture_job(folder, mixture, **settings), references))

    return run


# --- Layouts against one process ------------------------------------------------------------------------------------


def margin(ranked: Tensor, chosen: int) -> float:
    """How far the last of `chosen` is from the first that is not, relative, at the least over all tokens."""
    last, beaten = ranked.topk(chosen + 1, dim=-1).values[..., -2:].unbind(-1)
    return float(((last - beaten) / last.abs()).min())


def margins_of(job: Job, written: Path) -> list[float]:
    """The relative distance of each pass's closest call, in one process's training."""
    seen: list[float] = []
    choose = Experts.choose

    def choosing(self: Experts, logits: Tensor, bias: Tensor | None) -> Choice:
        choice = choose(self, logits, bias)
        scores = (logits.sigmoid() if self.sigmoid else logits.softmax(-1)).detach()
        ranked = scores if bias is None else scores + bias
        if self.settings.groups > 1:
            groups, kept = self.settings.groups, self.settings.groups_per_token
            seen.append(margin(ranked.unflatten(-1, (groups, -1)).topk(2, dim=-1).values.sum(-1), kept))
            ranked = keep_best_groups(ranked, groups, kept)
        seen.append(margin(ranked, self.settings.per_token))
        return choice

    with mock.patch.object(Experts, "choose", choosing):
        train_alone(job, torch.device("cpu"), written)
    return seen


@pytest.mark.parametrize(("mixture", "layers"), [*((name, 2) for name in MIXTURES), ("shared", 4)])
def test_no_choice_is_close(folder: Path, mixture: str, layers: int) -> None:
    job = mixture_job(folder, mixture, model={"layers": layers})
    margins = margins_of(job, folder / "margins.safetensors")
    assert len(margins) > job.run.steps
    assert min(margins) > LEAST_MARGIN


NO_MORE: dict[str, Any] = {}


class Case(NamedTuple):
    mixture: str
    axes: dict[str, int]
    accumulation: int = 1
    layout: dict[str, Any] = NO_MORE
    layers: int = 2

    def __str__(self) -> str:
        words = [f"{name}{value}" for name, value in (self.axes | self.layout).items()]
        return "-".join([self.mixture, *words, f"accumulation{self.accumulation}"])


FAST = [
    Case("mixtral", {}, 4),
    Case("mixtral", {"shard": 2, "expert": 2}, 2, {"recompute": "selective"}),
    Case("qwen3-moe", {"shard": 4, "expert": 2}, 1, {"recompute": 1}),
    Case("shared", {"shard": 2, "tensor": 2, "expert": 4}, 2, {"recompute": "full"}),
    Case("shared", {"replica": 2, "shard": 2, "expert": 2}, 1, {"zero": 2}),
    Case("qwen3-moe", {"tensor": 2}),
    Case("mixtral", {"pipeline": 2, "shard": 2, "expert": 2}, 2),
    Case("qwen3-moe", {"context": 2, "expert": 2}, 1),
    Case("shared", {"pipeline": 2, "shard": 2, "expert": 2}, 4, {"schedule": "zbv", "zero": 1}, 4),
]
SPREADS: list[dict[str, int]] = [
    {"shard": 2},
    {"replica": 2},
    {"tensor": 2, "expert": 2},
    {"tensor": 4, "expert": 2},
    {"shard": 4, "expert": 4},
    {"replica": 2, "tensor": 2, "expert": 2},
    {"shard": 2, "tensor": 2},
    {"shard": 2, "tensor": 2, "expert": 2},
    {"replica": 2, "shard": 2, "tensor": 2, "expert": 4},
    {"shard": 4, "tensor": 2, "expert": 8},
    {"shard": 8, "expert": 4},
    {"shard": 4, "tensor": 2},
]
POLICIES: list[tuple[int, dict[str, Any]]] = [
    (1, {"recompute": "selective", "zero": 1}),
    (2, {"recompute": "none", "zero": 2}),
    (1, {"recompute": "full", "zero": 3}),
    (2, {"recompute": 1, "zero": 1}),
]
# Mixtures and policies take turns, and another one begins each time, so that none always meets the same.
SLOW = [
    Case(list(MIXTURES)[(number + number // 3) % 3], axes, *POLICIES[(number + number // 4) % 4])
    for number, axes in enumerate(SPREADS)
]


@pytest.mark.parametrize("case", FAST, ids=str)
def test_layout_equals_one_process(compare: Callable[..., None], case: Case) -> None:
    model = {"layers": case.layers}
    compare(case.mixture, accumulation=case.accumulation, layout=case.axes | case.layout, model=model)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=str)
def test_every_layout_equals_one_process(compare: Callable[..., None], case: Case) -> None:
    model = {"layers": case.layers}
    compare(case.mixture, accumulation=case.accumulation, layout=case.axes | case.layout, model=model)


def test_selections_hold_each_policy_and_each_way_to_divide_experts() -> None:
    cases = FAST + SLOW
    assert {case.layout.get("recompute", "none") for case in cases} == {"none", "selective", "full", 1}
    assert {case.layout.get("zero", 3) for case in cases} == {1, 2, 3}
    for mixture in MIXTURES:
        assert {case.axes.get("expert", 1) > 1 for case in cases if case.mixture == mixture} == {False, True}


# --- Faults ---------------------------------------------------------------------------------------------------------


def weights_not_differentiated(_job: Job) -> AbstractContextManager[object]:
    """Routers decide, and are never told how well."""
    choose = Experts.choose

    def choosing(self: Experts, *arguments: Any) -> Choice:
        choice = choose(self, *arguments)
        return choice._replace(weights=choice.weights.detach())

    return mock.patch.object(Experts, "choose", choosing)


def token_dropped(_job: Job) -> AbstractContextManager[object]:
    """A rank's last row to another rank comes back as nothing."""
    back = expert.AllToAll._send_back

    def dropping(self: expert.AllToAll, *arguments: Any) -> Tensor:
        rows = back(self, *arguments)
        kept = torch.ones(len(rows), 1)
        kept[-1] = 0
        return rows * kept

    return mock.patch.object(expert.AllToAll, "_send_back", dropping)


def balance_of_each_rank(_job: Job) -> AbstractContextManager[object]:
    """Biases follow what a rank's own tokens did."""
    reduce_step = loop.reduce_step

    def reducing(*arguments: Any, loads: Tensor, **more: Any) -> Any:
        own = loads.clone()
        return reduce_step(*arguments, loads=loads, **more)._replace(loads=own)

    return mock.patch.object(loop, "reduce_step", reducing)


@pytest.fixture
def cause_of(folder: Path, references: References, tmp_path: Path) -> Callable[..., Cause]:
    """What verify makes of a fault in a layout of a mixture."""

    def find(fault: Fault, mixture: str, **layout: int) -> Cause:
        run = {"folder": str(tmp_path), "seed": MIXTURES[mixture][2]}
        verdict = verdict_of(mixture_job(folder, mixture, layout=layout, run=run), references, fault)
        assert not verdict.agrees
        assert verdict.cause is not None
        return verdict.cause

    return find


@pytest.mark.parametrize("axes", [{"shard": 2}, {"tensor": 2, "expert": 2}], ids=str)
def test_weights_that_are_not_differentiated_are_named(cause_of: Callable[..., Cause], axes: Any) -> None:
    cause = cause_of(weights_not_differentiated, "mixtral", **axes)
    assert cause.module == "blocks.1.feed_forward.router"
    assert "differentiated" in cause.likely


@pytest.mark.parametrize("axes", [{"shard": 2, "expert": 2}, {"shard": 2, "tensor": 2, "expert": 4}], ids=str)
def test_a_dropped_token_is_named(cause_of: Callable[..., Cause], axes: Any) -> None:
    cause = cause_of(token_dropped, "mixtral", **axes)
    assert cause.module == "blocks.0.feed_forward.experts"
    assert "dropped" in cause.likely


def transfers_of(job: Job) -> int:
    """All-to-alls of one forward and backward pass on a rank."""
    torch.set_num_threads(1)
    device = start_distributed(job.cluster)
    mesh = build_mesh(job.layout, device)
    model = build_parallel_model(job, mesh, device)
    seen = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal seen
            seen += func is torch.ops._c10d_functional.all_to_all_single.default
            return func(*args, **(kwargs or {}))

    tokens = torch.randint(263, (4, 16), generator=torch.Generator().manual_seed(device.index or 0))
    with Count():
        model(tokens).square().mean().backward()
    stop_distributed()
    return seen


@pytest.mark.parametrize(("recompute", "more"), [("none", 0), ("selective", 0), ("full", 3)])
def test_selective_recompute_sends_no_token_again(folder: Path, tmp_path: Path, recompute: str, more: int) -> None:
    job = mixture_job(
        folder, "mixtral", layout={"shard": 2, "expert": 2, "recompute": recompute}, run={"folder": str(tmp_path)}
    )
    # In each layer counts, rows and results forward, rows and results backward; computed again, what came forward.
    assert run_ranks(2, transfers_of, job) == [2 * (5 + more)] * 2


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


def test_biases_moved_by_one_ranks_tokens_are_noticed(cause_of: Callable[..., Cause]) -> None:
    cause_of(balance_of_each_rank, "mixtral", shard=2)


# --- Routing and balance against explicit math ----------------------------------------------------------------------


def built(**experts: Any) -> tuple[ModelSpec, Decoder]:
    """A mixture of one layer in double precision, its routers far from even."""
    numbers = Numbers(count=6, per_token=2, feed_forward=10, **experts)
    spec = ModelSpec(
        family="mixtral",
        layers=1,
        d_model=12,
        heads=2,
        kv_heads=2,
        head_dim=6,
        feed_forward=8,
        vocabulary=31,
        experts=numbers,
    )
    model = build_model(spec, "cpu").double()
    initialize_(model, spec, 3)
    with torch.no_grad():
        for mixture in mixtures_of(model):
            mixture.router.weight.mul_(20)
    return spec, model


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
    numbers = Numbers(
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
    assert float(taken[0]) == pytest.approx(coefficient * float(total) / 3, rel=1e-6)


# --- What a run keeps and tells -------------------------------------------------------------------------------------


def test_another_layout_of_the_experts_goes_on_where_the_first_stopped(folder: Path, tmp_path: Path) -> None:
    """Weights, moments and biases, saved by one layout and read by others."""

    def train(name: str, steps: int, layout: dict[str, int]) -> tuple[list[Metrics], Tensors]:
        """Train a run, begun or not, to the checkpoint after `steps`."""
        job = mixture_job(
            folder,
            "shared",
            layout=layout,
            run={"folder": str(tmp_path), "name": name, "seed": MIXTURES["shared"][2]},
            optimizer={"name": "adamw", "learning_rate": 0.01},
            checkpoint={"every_steps": 1, "keep": 0},
        )
        run = RunFolder(tmp_path / name)
        attempt = new_attempt(run, job) if run.path.exists() else new_run(job)[1]
        run_ranks(job.layout.world_size, train_rank, job, run, attempt)
        for later in run.checkpoints.glob("step-*"):
            if int(later.name.removeprefix("step-")) > steps:
                shutil.rmtree(later)
        return read_metrics(run)[0], weights(job, run)

    whole, end = train("whole", 5, {"shard": 2, "expert": 2})
    train("parted", 1, {"shard": 2, "expert": 2})
    train("parted", 3, {"tensor": 2})
    lines, again = train("parted", 5, {"shard": 4, "expert": 2})
    assert [line.step for line in lines] == [0, 1, 2, 3, 4]
    for line, wanted in zip(lines, whole, strict=True):
        assert line.loss == pytest.approx(wanted.loss, rel=1e-5)
        assert line.gradient_norm == pytest.approx(wanted.gradient_norm, rel=1e-5)
    for name, tensor in again.items():
        # Adam amplifies round-off where a gradient is nearly zero, so norms are compared, not elements.
        assert (tensor - end[name]).norm() <= 1e-5 * end[name].norm(), name
    assert any(name.endswith("router.bias") and tensor.any() for name, tensor in again.items())


def test_load_and_balance_are_told(folder: Path, tmp_path: Path) -> None:
    job = mixture_job(
        folder, "mixtral", layout={"shard": 2, "expert": 2}, run={"folder": str(tmp_path), "name": "told"}
    )
    lines, _, _ = train_layout(job)
    for line in lines:
        assert line.expert_load is not None and 1 <= line.expert_load <= 8 / 2
        assert line.balance_loss is not None and line.balance_loss >= 2 * 0.3 * 0.9
    assert "fullest expert" in describe(lines[-1])


def test_a_profiled_step_says_what_each_ranks_experts_were_sent(folder: Path, tmp_path: Path) -> None:
    """The rows of all ranks are the tokens' choices, computed again or not; their transfers are the expert axis's."""
    job = mixture_job(
        folder,
        "mixtral",
        accumulation=2,
        layout={"shard": 2, "tensor": 2, "expert": 2, "recompute": "full"},
        run={"folder": str(tmp_path), "name": "traced"},
        trace={"every_steps": 2},
    )
    run, attempt = new_run(job)
    run_ranks(4, train_rank, job, run, attempt)
    steps = {
        rank: [e.measured for e in events if isinstance(e, Step)] for rank, events in read_events(run, attempt).items()
    }
    profiled = [measured[0] for measured in steps.values()]
    assert len(profiled) == 4
    for measured in profiled:
        assert len(measured.expert_rows) == 2 * 2
        assert 0 < measured.expert_share < 0.5
        ranks = {transfer.ranks for transfer in measured.transfers if transfer.purpose == "expert"}
        assert ranks == {(0, 1)} if measured.rank < 2 else {(2, 3)}
    rows = [sum(passes) for passes in zip(*(measured.expert_rows for measured in profiled), strict=True)]
    assert rows == [4 * 16 * 2] * 4


# --- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "experts", "names", "reason", "nearest"),
    [
        ({"shard": 4, "expert": 3}, {}, "layout.expert = 3", "tensor = 4, the ranks that it reuses", "expert = 2"),
        ({"shard": 4, "expert": 4}, {"count": 6}, "layout.expert = 4", "model.experts.count = 6", "expert = 2"),
        ({"shard": 4}, {"feed_forward": 6}, "layout.expert = 1", "leaves 4 ranks", "layout.expert = 2"),
        ({"shard": 4}, {"feed_forward": 6, "count": 5}, "layout.expert = 1", "nor model.d_model = 34", "fewer ranks"),
        ({}, {"per_token": 9}, "model.experts.per_token = 9", "between 1 and 8", "per_token = 8"),
        ({}, {"groups": 3}, "model.experts.groups = 3", "does not divide model.experts.count = 8", "groups = 2"),
        ({}, {"groups": 4, "per_token": 3}, "model.experts.per_token = 3", "more than the 2 experts", "per_token = 2"),
        ({}, {"dense_layers": 2}, "model.experts.dense_layers = 2", "between 0 and 1", "dense_layers = 1"),
        ({}, {"bias_rate": -1.0}, "model.experts.bias_rate = -1.0", "between 0.0 and 1.0", "bias_rate = 0.0"),
        ({}, {"balance_loss": -1.0}, "model.experts.balance_loss = -1.0", "between", "balance_loss = 0.0"),
    ],
)
def test_what_cannot_be_divided_or_routed_is_one_line(
    tmp_path: Path, layout: dict[str, int], experts: dict[str, Any], names: str, reason: str, nearest: str
) -> None:
    numbers = {"count": 8, "per_token": 2, "feed_forward": 24} | experts
    with pytest.raises(SettingError) as refused:
        mixture_job(tmp_path, "mixtral", layout=layout, model={"experts": numbers, "d_model": 34})
    error = refused.value
    assert names in error.setting and reason in error.reason and nearest in error.nearest


@pytest.mark.parametrize("setting", [{"balance_loss": 0.1}, {"bias_rate": 0.1}])
def test_balance_means_nothing_without_experts(tmp_path: Path, setting: dict[str, float]) -> None:
    with pytest.raises(SettingError, match=r"model\.experts: means nothing to llama"):
        tiny_job(tmp_path, model={"experts": {"count": 4, "per_token": 1, "feed_forward": 8} | setting})


def test_a_bias_that_transformers_cannot_say_is_refused() -> None:
    with pytest.raises(SettingError, match="no bias to choose experts by"):
        config_of_model(built(bias_rate=0.1)[0])


def test_other_models_have_no_expert_axis() -> None:
    layout = Layout(shard=2, expert=2)
    with pytest.raises(SettingError, match="no experts"):
        check_units(Foreign(), layout, mock.MagicMock(), [], [])
