"""Predicted activations against what the built model keeps: by family, by recompute policy, along the tensor axis."""

import gc
from typing import Any, Literal, NamedTuple

import msgspec
import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from meshwright.models import Decoder, build_model, build_view
from meshwright.parallel import build_mesh, start_distributed
from meshwright.parallel.context import apply_context, cut_sequence
from meshwright.parallel.expert import apply_expert, build_expert_axis
from meshwright.parallel.later import Later, put_products_off
from meshwright.parallel.part import local
from meshwright.parallel.recompute import prepare_block
from meshwright.parallel.tensor import Heads, apply_tensor
from meshwright.plan.activations import activation_bytes, stage_activations
from meshwright.plan.machine import cpu_cluster
from meshwright.plan.part import build_part
from meshwright.spec import (
    DataSettings,
    Experts,
    FamilyName,
    Job,
    Layout,
    ModelSpec,
    Recompute,
    RunSettings,
    check_job,
    split_table,
)

MICROBATCH, SEQUENCE = 2, 64
CPU = torch.device("cpu")


class Made(TorchDispatchMode):
    """Remembers the memory of every tensor that operators make, and which of it is still held."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does to this rank's part comes by again
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.remember(tensor)
        return result

    def remember(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    def held_bytes(self, *, but: list[Tensor]) -> int:
        gc.collect()
        left_out = {storage_of(tensor)._cdata for tensor in but}
        return sum(size for at, (ref, size) in self._made.items() if at not in left_out and not ref.expired())


def storage_of(tensor: Tensor) -> Any:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()


Sees = Literal["all", "window", "documents"]


def a_job(family: FamilyName, layout: Layout, *, sees: Sees = "all", **numbers: Any) -> Job:
    more: dict[str, Any] = {"kv_heads": 2, "attention_window": 17 if sees == "window" else 0} | numbers
    if family == "gpt2":
        more = {"tied_embeddings": True} | more | {"kv_heads": 4, "max_positions": SEQUENCE}
    model = ModelSpec(
        family=family,
        layers=3,
        d_model=64,
        heads=4,
        head_dim=16,
        feed_forward=96,
        # So large that a block's tensors, while it runs again, are fewer than the loss's.
        vocabulary=1500,
        **more,
    )
    job = Job(
        run=RunSettings(name="test", steps=1),
        model=model,
        data=DataSettings(
            sequence=SEQUENCE,
            global_batch=MICROBATCH * layout.data_size,
            attention="document" if sees == "documents" else "sample",
        ),
        layout=layout,
        cluster=cpu_cluster(layout.world_size),
    )
    check_job(job)
    return job


class Batch(NamedTuple):
    """Whole samples, as data has them."""

    tokens: Tensor
    targets: Tensor
    documents: Tensor | None


def kept_bytes(model: Decoder, job: Job, mesh: DeviceMesh | None = None) -> int:
    """What a forward pass leaves behind on this rank, logits and parameters left out."""
    for index, block in enumerate(model.blocks.values()):
        prepare_block(block, job.layout, index, compiled=False)
    model.to_empty(device="cpu")
    torch.manual_seed(1)
    for tensor in (*model.parameters(), *model.buffers()):
        # As one process would have them or not: routers are to send tokens to all experts.
        local(tensor.detach()).normal_(std=0.02)
    documents = (torch.arange(SEQUENCE, dtype=torch.int32) // 9).repeat(MICROBATCH, 1)
    tokens = torch.randint(1500, (MICROBATCH, SEQUENCE))
    batch = Batch(tokens, tokens, documents if job.data.attention == "document" else None)
    if mesh is None:
        here, view = tokens, build_view(model.spec, SEQUENCE, batch.documents, tokens.device)
    else:
        here, targets, view = cut_sequence(batch, job.model, job.layout, mesh)
        del targets
    with Made() as made:
        for tensor in (view.places, view.mask):
            if isinstance(tensor, Tensor):
                made.remember(tensor)
        logits = model(here, view)
    # Places that nothing needs again are gone with it.
    del view, tensor
    return made.held_bytes(but=[logits, documents, here, *model.parameters()]) + here.nbytes


def kept_on_a_rank(job: Job) -> int:
    device, layout = start_distributed(job.cluster), job.layout
    model, mesh = build_model(job.model), build_mesh(job.layout, device)
    if layout.context > 1:
        apply_context(model, layout, mesh["context"], job.model.attention_window)
    if job.model.experts:
        apply_expert(model, build_expert_axis(layout, mesh, job.data.global_batch))
    if layout.tensor > 1:
        heads = Heads(job.model.kv_heads, job.model.head_dim)
        apply_tensor(model, split_table(job.model), mesh["tensor"], heads)
    return kept_bytes(model, job, mesh)


each_policy = pytest.mark.parametrize("recompute", ["none", "selective", 2, "full"])


@each_policy
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gpt2"])
def test_activations_are_what_the_built_model_keeps(family: FamilyName, recompute: Recompute | int) -> None:
    job = a_job(family, Layout(microbatch=MICROBATCH, precision="fp32", recompute=recompute))
    assert activation_bytes(job, build_part(job)) == kept_bytes(build_model(job.model), job)


@each_policy
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("sees", ["window", "documents"])
def test_and_what_it_keeps_of_masks(family: FamilyName, sees: Sees, recompute: Recompute | int) -> None:
    job = a_job(family, Layout(microbatch=MICROBATCH, precision="fp32", recompute=recompute), sees=sees)
    assert activation_bytes(job, build_part(job)) == kept_bytes(build_model(job.model), job)


def test_without_shared_key_heads() -> None:
    job = a_job("llama", Layout(microbatch=MICROBATCH, precision="fp32"), kv_heads=4)
    assert activation_bytes(job, build_part(job)) == kept_bytes(build_model(job.model), job)


@each_policy
@pytest.mark.parametrize(
    ("family", "tensor", "sees"),
    [
        ("llama", 2, "documents"),
        ("llama", 4, "all"),
        ("mistral", 2, "window"),
        ("qwen3", 2, "all"),
        ("gpt2", 2, "all"),
    ],
)
def test_and_what_it_keeps_along_tensor(
    family: FamilyName, tensor: int, sees: Sees, recompute: Recompute | int
) -> None:
    """Four ranks share the two key heads."""
    layout = Layout(microbatch=MICROBATCH, precision="fp32", recompute=recompute, tensor=tensor)
    job = a_job(family, layout, sees=sees)
    assert set(run_ranks(tensor, kept_on_a_rank, job)) == {activation_bytes(job, build_part(job))}


def put_off_bytes_on_a_rank(job: Job) -> int:
    """What a backward pass leaves for its second half, logits and all."""
    model = build_model(job.model)
    later = Later()
    put_products_off(model, later)
    if job.layout.tensor > 1:
        mesh = build_mesh(job.layout, start_distributed(job.cluster))["tensor"]
        table = split_table(job.model)
        apply_tensor(model, table, mesh, Heads(job.model.kv_heads, job.model.head_dim))
    for index, block in enumerate(model.blocks.values()):
        prepare_block(block, job.layout, index, compiled=False)
    model.to_empty(device="cpu")
    logits = model(torch.zeros(MICROBATCH, SEQUENCE, dtype=torch.int64), build_view(model.spec, SEQUENCE, None, CPU))
    logits.backward(torch.ones_like(logits))
    held = [storage_of(tensor) for product in later.take() for tensor in (product.x, product.gradient)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())


@pytest.mark.parametrize(
    ("family", "tensor", "recompute"),
    [
        ("llama", 1, "none"),
        ("llama", 1, "full"),
        ("qwen3", 1, "selective"),
        ("gpt2", 1, "none"),
        ("llama", 4, "full"),
        ("gpt2", 2, "none"),
    ],
)
def test_products_put_off_hold_what_is_predicted(family: FamilyName, tensor: int, recompute: Recompute) -> None:
    """Whatever is recomputed: inputs are there by then, and so are gradients."""
    layout = Layout(microbatch=MICROBATCH, precision="fp32", tensor=tensor, recompute=recompute)
    job = a_job(family, layout, tied_embeddings=False)
    part = build_part(job)
    cut_in_two = msgspec.structs.replace(job, layout=msgspec.structs.replace(layout, schedule="zero-bubble"))
    predicted = stage_activations(cut_in_two, part.cut, part.stages[0]).put_off
    assert set(run_ranks(tensor, put_off_bytes_on_a_rank, job)) == {predicted}


PLAIN_MIXTURE = Experts(count=8, per_token=2, feed_forward=40)
# All that routing can have besides.
FULL_MIXTURE = Experts(
    count=8, per_token=3, feed_forward=40, shared=2, dense_layers=1, groups=4, groups_per_token=2, balance_loss=0.1
)


@each_policy
@pytest.mark.parametrize(
    ("family", "experts"),
    [
        ("mixtral", PLAIN_MIXTURE),
        ("mixtral", FULL_MIXTURE),
        ("qwen3-moe", msgspec.structs.replace(PLAIN_MIXTURE, normalised=False)),
    ],
)
def test_and_what_mixtures_keep(family: FamilyName, experts: Experts, recompute: Recompute | int) -> None:
    job = a_job(family, Layout(microbatch=MICROBATCH, precision="fp32", recompute=recompute), experts=experts)
    assert activation_bytes(job, build_part(job)) == kept_bytes(build_model(job.model), job)


@pytest.mark.parametrize(
    ("experts", "axes", "recompute"),
    [
        (PLAIN_MIXTURE, {"shard": 2, "expert": 2}, "none"),
        (PLAIN_MIXTURE, {"shard": 2, "expert": 2}, "full"),
        (PLAIN_MIXTURE, {"tensor": 2, "expert": 2}, "selective"),
        (FULL_MIXTURE, {"tensor": 2}, "none"),
        (FULL_MIXTURE, {"tensor": 2}, "selective"),
    ],
)
def test_and_of_experts_on_other_ranks(experts: Experts, axes: dict[str, Any], recompute: Recompute) -> None:
    """What one rank has more than the mean of tokens that are sent, another has less."""
    job = a_job(
        "mixtral", Layout(microbatch=MICROBATCH, precision="fp32", recompute=recompute, **axes), experts=experts
    )
    kept = run_ranks(2, kept_on_a_rank, job)
    assert sum(kept) / 2 == activation_bytes(job, build_part(job))


@pytest.mark.parametrize(
    ("family", "axes", "sees", "recompute"),
    [
        ("llama", {"context": 2}, "documents", "none"),
        ("gpt2", {"context": 2, "tensor": 2}, "all", "selective"),
        ("llama", {"context": 2}, "documents", "full"),
        ("mistral", {"context": 2, "context_form": "all-to-all"}, "window", "none"),
        # One key head for two ranks is repeated.
        ("qwen3", {"context": 2, "context_form": "all-to-all", "tensor": 2}, "all", "selective"),
    ],
)
def test_and_along_context(family: FamilyName, axes: dict[str, Any], sees: Sees, recompute: Recompute) -> None:
    layout = Layout(microbatch=MICROBATCH, precision="fp32", recompute=recompute, **axes)
    job = a_job(family, layout, sees=sees)
    assert set(run_ranks(layout.world_size, kept_on_a_rank, job)) == {activation_bytes(job, build_part(job))}


def test_a_block_that_runs_again_can_be_the_peak() -> None:
    """Its tensors take the place of the loss's, which are gone by then."""

    def predicted(recompute: Recompute, vocabulary: int) -> float:
        job = a_job("llama", Layout(precision="fp32", recompute=recompute))
        job = msgspec.structs.replace(job, model=msgspec.structs.replace(job.model, vocabulary=vocabulary))
        return activation_bytes(job, build_part(job))

    assert predicted("none", 8) == predicted("none", 4000)
    block = (predicted("none", 4000) - predicted("full", 4000)) / 3 + 4 * 64 * SEQUENCE
    logits = 3 * 4 * 8 * SEQUENCE
    assert predicted("full", 8) - predicted("full", 4000) == pytest.approx(block - logits)
