"""Models that the package does not know: every layout gives the loss and the gradients of one process."""

import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from foreign import HEAD_DIM, KV_HEADS, TABLE, TOKENS, Foreign, Unbatched
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from meshwright.models import token_loss
from meshwright.parallel import (
    begin_microbatch,
    build_mesh,
    build_token_loss,
    clip_gradients,
    data_rank,
    local_part,
    parallelize,
    reduce_step,
    squared_norm,
    start_distributed,
)
from meshwright.spec import Layout, SettingError, SplitTable

ROOT = Path(__file__).parents[1]
BOUND = 1e-5
BATCH, SEQUENCE, MICROBATCHES = 8, 12, 2

LLAMA_TABLE: SplitTable = {
    "model.embed_tokens": "vocabulary",
    "model.layers.*.input_layernorm": "sequence",
    "model.layers.*.self_attn": "gather",
    "model.layers.*.self_attn.q_proj": "column",
    "model.layers.*.self_attn.k_proj": "kv_heads",
    "model.layers.*.self_attn.v_proj": "kv_heads",
    "model.layers.*.self_attn.o_proj": "row",
    "model.layers.*.post_attention_layernorm": "sequence",
    "model.layers.*.mlp": "gather",
    "model.layers.*.mlp.gate_proj": "column",
    "model.layers.*.mlp.up_proj": "column",
    "model.layers.*.mlp.down_proj": "row",
    "model.norm": "sequence",
    "lm_head": "logits",
}


class Case:
    """A model, how it is called, and what `parallelize` is told of it."""

    def __init__(self, model: nn.Module, logits: Callable[[nn.Module, Tensor], Tensor], **told: Any) -> None:
        self.model, self.logits, self.told = model, logits, told


def foreign(kind: type[Foreign] = Foreign) -> Case:
    torch.manual_seed(5)
    told = {"blocks": ["stack.*"], "tail": ["last", "guess"], "table": TABLE}
    return Case(kind(), lambda model, tokens: model(tokens), **told, kv_heads=KV_HEADS, head_dim=HEAD_DIM)


def llama(**more: Any) -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **more,
    )
    torch.manual_seed(6)
    told = {"blocks": ["model.layers.*"], "table": LLAMA_TABLE, "kv_heads": 2, "head_dim": 8}
    return Case(LlamaForCausalLM(config), llama_logits, **told)


def llama_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    # Along tensor the embedding gives a part of the sequence, from which the model would count too few positions.
    positions = torch.arange(tokens.shape[1])[None]
    return model(input_ids=tokens, position_ids=positions, use_cache=False).logits


def a_batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(TOKENS, (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(7))
    return tokens[:, :-1], tokens[:, 1:]


def alone(case: Case) -> tuple[float, float, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, gradient norm, gradients, and weights after a clipped step of SGD, in one process."""
    model = copy.deepcopy(case.model)
    tokens, targets = a_batch()
    loss = token_loss(case.logits(model, tokens), targets) / targets.numel()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    return loss.item(), norm.item(), gradients, {name: p.detach() for name, p in model.named_parameters()}


def worst_on_a_rank(case: Case, layout: Layout, expected: Any, *, from_meta: bool = False) -> dict[str, float]:
    """The largest relative differences of this rank's parts from one process."""
    loss_alone, norm_alone, gradients, weights = expected
    mesh = build_mesh(layout, start_distributed())
    model, told = case.model, case.told
    if from_meta:
        values = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        model = model.to("meta")
        told = told | {"initialize": lambda name, _shape: values[name].detach()}
    model = parallelize(model, layout, mesh, **told)
    loss_of = build_token_loss(TOKENS, layout, mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    tokens, targets = (whole.chunk(layout.data_size)[data_rank(mesh)] for whole in a_batch())
    loss = torch.zeros(())
    for index, (inputs, wanted) in enumerate(zip(tokens.chunk(MICROBATCHES), targets.chunk(MICROBATCHES), strict=True)):
        begin_microbatch(model, layout, last=index == MICROBATCHES - 1)
        part = loss_of(case.logits(model, inputs), wanted) / (BATCH * SEQUENCE)
        part.backward()
        loss += part.detach()
    totals = reduce_step(loss, squared_norm(model), layout, stop=False)
    of_gradients = worst({name: p.grad for name, p in model.named_parameters()}, gradients)
    clip_gradients(model, totals.gradient_norm, 0.1)
    optimizer.step()
    return {
        "loss": abs(totals.loss.item() / loss_alone - 1),
        "norm": abs(totals.gradient_norm.item() / norm_alone - 1),
        "gradients": of_gradients,
        "weights": worst({name: p.detach() for name, p in model.named_parameters()}, weights),
    }


def worst(ours: dict[str, Tensor | None], theirs: dict[str, Tensor]) -> float:
    """Largest norm of the difference between this rank's part and the same part of the whole, over the whole's norm."""
    assert ours.keys() == theirs.keys()
    largest = 0.0
    for name, whole in theirs.items():
        tensor = ours[name]
        assert tensor is not None and tensor.shape == whole.shape
        part, offset, shape = local_part(tensor)
        same = whole[tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))]
        largest = max(largest, (torch.linalg.vector_norm(part - same) / torch.linalg.vector_norm(whole)).item())
    return largest


def assert_equals_one_process(case: Case, layout: Layout, **options: Any) -> None:
    ranks = run_ranks(layout.world_size, check_rank, case, layout, alone(case), options)
    assert all(max(found.values()) < BOUND for found in ranks), ranks


def check_rank(case: Case, layout: Layout, expected: Any, options: dict[str, Any]) -> dict[str, float]:
    return worst_on_a_rank(case, layout, expected, **options)


LAYOUTS = [
    Layout(replica=2, precision="fp32"),
    *(Layout(shard=2, zero=zero, precision="fp32") for zero in (1, 2, 3)),
    Layout(tensor=2, precision="fp32"),
]
MORE = [
    Layout(precision="fp32"),
    Layout(shard=2, tensor=2, precision="fp32"),
    Layout(tensor=4, precision="fp32"),
    Layout(shard=2, recompute="full", precision="fp32"),
    Layout(tensor=2, recompute="selective", precision="fp32"),
]


@pytest.mark.parametrize("layout", [*LAYOUTS, *MORE], ids=Layout.label)
def test_a_foreign_module_equals_one_process(layout: Layout) -> None:
    assert_equals_one_process(foreign(), layout)


def test_positions_without_a_batch() -> None:
    assert_equals_one_process(foreign(Unbatched), Layout(tensor=2, precision="fp32"))


@pytest.mark.parametrize("layout", [*LAYOUTS, *MORE], ids=Layout.label)
def test_a_transformers_model_equals_one_process(layout: Layout) -> None:
    assert_equals_one_process(llama(), layout)


@pytest.mark.parametrize("case", [foreign, llama])
def test_a_model_built_without_memory_is_filled(case: Callable[[], Case]) -> None:
    assert_equals_one_process(case(), Layout(shard=2, tensor=2, precision="fp32"), from_meta=True)


def test_tied_embeddings_of_a_transformers_model() -> None:
    assert_equals_one_process(llama(tie_word_embeddings=True), Layout(shard=2, precision="fp32"))


def dropped(layout: Layout) -> list[float]:
    """The gradient norm with dropout, from the same draw, with and without recompute."""
    mesh = build_mesh(layout, start_distributed())
    norms: list[float] = []
    for recompute in ("none", "full"):
        torch.manual_seed(5)
        changed = Layout(recompute=recompute, precision="fp32")
        model = parallelize(Foreign(drop=0.5), changed, mesh, blocks=["stack.*"])
        tokens, targets = a_batch()
        begin_microbatch(model, changed, last=True)
        token_loss(model(tokens), targets).backward()
        norms.append(squared_norm(model).item())
    return norms


def test_dropout_draws_the_same_again_when_a_block_is_recomputed() -> None:
    plain, again = run_ranks(1, dropped, Layout())[0]
    assert again == pytest.approx(plain, rel=BOUND)


def made(**words: Any) -> Layout:
    """A layout with words that it does not have: in Python nothing looks at them."""
    return Layout(**words)


TENSOR = Layout(tensor=2)
REFUSALS: list[tuple[dict[str, Any], Layout, str]] = [
    ({"blocks": ["stak.*"]}, Layout(), r'blocks "stak\.\*": matches no module; nearest that works: "stack\.\*"'),
    ({"blocks": ["stack"]}, Layout(), r'blocks "stack": is a list .* nearest that works: "stack\.\*"'),
    ({"blocks": "stack.*"}, Layout(), r'blocks = "stack\.\*": must be a list; .* blocks = \["stack\.\*"\]'),
    ({"tail": ["gues"]}, Layout(), r'tail "gues": is no module; nearest that works: guess'),
    ({"tail": [""]}, Layout(), r'tail "": is no module'),
    ({"tail": ["stack"]}, Layout(), r'tail "stack": is a list of modules'),
    ({"tail": ["stack.1"]}, Layout(), r'tail "stack\.1": has modules of a block'),
    ({"tail": ["stack.1.before"]}, Layout(), r'tail "stack\.1\.before": has modules of a block'),
    ({"tail": ["last", "last"]}, Layout(), r'tail "last": has modules of "last", which is there too'),
    ({"tail": "guess"}, Layout(), r'tail = "guess": must be a list'),
    ({"table": None}, TENSOR, r"layout\.tensor = 2: the model has no split table; .* layout\.tensor = 1"),
    ({"table": TABLE | {"lost": "sequence"}}, TENSOR, r'table "lost": matches no module; .* "last"'),
    ({"table": {k: w for k, w in TABLE.items() if k != "last"}}, TENSOR, r'table "last": has parameters .* no word'),
    ({"table": TABLE | {"last": "sequnce"}}, TENSOR, r'table "last" = "sequnce": is no word .* works: sequence'),
    (
        {"table": {k: w for k, w in TABLE.items() if k != "stack.*.think"}},
        TENSOR,
        r'table "stack\.0\.think\.0" = "column": is inside no module .*; .* "stack\.0\.think" = "gather"',
    ),
    ({"kv_heads": None}, TENSOR, r"needs to know the heads; .* kv_heads=\.\.\., head_dim=\.\.\."),
    ({}, Layout(tensor=3), r"layout\.tensor = 3: does not divide stack\.0\.look\.ask\.weight, 16 long"),
    ({}, Layout(expert=2), r"layout\.expert = 2: where another model.s experts are"),
    ({}, Layout(recompute=3), r"layout\.recompute = 3: there are 2 blocks; .* layout\.recompute = 2"),
    ({}, Layout(tensor=2, async_tensor=True), r"layout\.async_tensor = true: needs GPUs"),
    ({}, made(recompute="half"), r'layout\.recompute = "half": .* layout\.recompute = "none"'),
    ({}, made(precision="fp16"), r'layout\.precision = "fp16": .* layout\.precision = "bf16"'),
    ({}, made(zero=4), r"layout\.zero = 4: is none of the choices; .* layout\.zero = 1, 2 or 3"),
    ({}, made(order=("tensor",)), r"layout\.order = \['tensor'\]: must name each axis of the mesh once"),
    ({"initialize": torch.zeros}, Layout(), r"initialize: the model has values already"),
]


def refusal(told: dict[str, Any], layout: Layout) -> str:
    """What a rank is told, on a mesh of the layout's shape made of no real ranks."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.world_size)
    case = foreign()
    try:
        parallelize(case.model, layout, build_mesh(layout, torch.device("cpu")), **(case.told | told))
    except SettingError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(("told", "layout", "line"), REFUSALS)
def test_what_cannot_be_honoured_is_one_line(told: dict[str, Any], layout: Layout, line: str) -> None:
    assert re.search(line, run_ranks(1, refusal, told, layout)[0])


def refused_ranks() -> str:
    device = start_distributed()
    with pytest.raises(SettingError) as caught:
        build_mesh(Layout(shard=2), device)
    return str(caught.value)


def test_a_layout_of_other_ranks_than_there_are_is_refused() -> None:
    assert run_ranks(1, refused_ranks) == [
        "layout of 2 ranks: there are 1; nearest that works: sizes that multiply to 1"
    ]


def refused_tie() -> str:
    case, tied = foreign(), Foreign()
    tied.guess.weight = tied.words.weight
    with pytest.raises(SettingError) as caught:
        parallelize(tied, Layout(), build_mesh(Layout(), start_distributed()), **case.told)
    return str(caught.value)


def test_a_tail_that_shares_a_parameter_is_refused() -> None:
    assert run_ranks(1, refused_tie)[0].startswith(
        "guess.weight: is the same parameter as words.weight, and they would"
    )


def norms_in_bf16() -> tuple[float, float]:
    """The norm of gradients that are themselves in bf16, ours and one summed in fp64."""
    layout = Layout()
    model = parallelize(Foreign().bfloat16(), layout, build_mesh(layout, start_distributed()), blocks=["stack.*"])
    tokens, targets = a_batch()
    begin_microbatch(model, layout, last=True)
    token_loss(model(tokens), targets).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    wide = [gradient.full_tensor().double() for gradient in gradients if isinstance(gradient, DTensor)]
    return squared_norm(model).item() ** 0.5, sum(gradient.square().sum().item() for gradient in wide) ** 0.5


def test_the_norm_of_gradients_in_bf16_is_summed_in_fp32() -> None:
    ours, exact = run_ranks(1, norms_in_bf16)[0]
    assert ours == pytest.approx(exact, rel=1e-6)


def refused_sequence() -> str:
    case = foreign()
    model = parallelize(case.model, TENSOR, build_mesh(TENSOR, start_distributed()), **case.told)
    with pytest.raises(SettingError) as caught:
        model(torch.zeros(1, 7, dtype=torch.int64))
    return str(caught.value)


def test_a_sequence_that_does_not_divide_is_refused() -> None:
    assert "layout.tensor = 2: does not divide the sequence, 7 long" in run_ranks(2, refused_sequence)[0]


@pytest.mark.parametrize(
    "arguments",
    [pytest.param([], marks=pytest.mark.slow), ["shrad"], pytest.param(["shard"], marks=pytest.mark.slow)],
    ids=["no axis", "a slip", "no torchrun"],
)
def test_the_example_says_how_it_is_used(arguments: list[str]) -> None:
    command = [sys.executable, ROOT / "examples" / "own_model.py", *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert "torchrun --nproc-per-node 2 examples/own_model.py AXIS" in finished.stderr
    assert finished.stderr.count("\n") == 1


@pytest.mark.parametrize("axis", ["shard", "tensor"])
def test_the_example_of_the_page(axis: str) -> None:
    example = ROOT / "examples" / "own_model.py"
    assert example.read_text() in (ROOT / "docs" / "own-model.md").read_text()
    command = [Path(sys.executable).with_name("torchrun"), "--nproc-per-node", "2", example, axis]
    finished = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert "UserWarning" not in finished.stderr
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", finished.stdout)]
    assert len(losses) == 4 and losses[-1] < losses[0] / 4
