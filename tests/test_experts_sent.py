"""What a rank sends of a mixture, and what it holds of it between microbatches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import mixture_job
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from meshwright.data import prepare
from meshwright.launch.shrink import write_text
from meshwright.parallel import (
    Passes,
    build_loss,
    build_mesh,
    build_parallel_model,
    start_distributed,
    stop_distributed,
)
from meshwright.parallel.expert import experts_of
from meshwright.spec import Job
from meshwright.trace.memory import gathered_bytes, tensor_bytes
from meshwright.train.setup import build_batches, open_data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_text(tmp_path)
    return tmp_path


def transfers_of(job: Job) -> int:
    """All-to-alls of one forward and backward pass on a rank."""
    torch.set_num_threads(1)
    device = start_distributed(job.cluster)
    mesh = build_mesh(job.layout, device)
    stage = build_parallel_model(job, mesh, device).parts[0]
    seen = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal seen
            seen += func is torch.ops._c10d_functional.all_to_all_single.default
            return func(*args, **(kwargs or {}))

    tokens = torch.randint(263, (4, 16), generator=torch.Generator().manual_seed(device.index or 0))
    with Count():
        stage(tokens).square().mean().backward()
    stop_distributed()
    return seen


@pytest.mark.parametrize(("recompute", "more"), [("none", 0), ("selective", 0), ("full", 3)])
def test_selective_recompute_sends_no_token_again(folder: Path, recompute: str, more: int) -> None:
    job = mixture_job(folder, "mixtral", layout={"shard": 2, "expert": 2, "recompute": recompute})
    # In each layer counts, rows and results forward, rows and results backward; computed again, what came forward.
    assert run_ranks(2, transfers_of, job) == [2 * (5 + more)] * 2


def held_of(job: Job) -> tuple[float, float, float]:
    """Of a rank's experts between two microbatches: bytes gathered, and of gradients; and of what it owns of them."""
    torch.set_num_threads(1)
    device = start_distributed(job.cluster)
    mesh = build_mesh(job.layout, device)
    model = build_parallel_model(job, mesh, device)
    loss_of = build_loss(job, mesh, device)
    batches = build_batches(open_data(job), job, mesh, device)
    share = batches.next(0)
    passes = Passes(model, len(share.microbatches))
    stacks = [stack for experts in experts_of(model) for stack in experts.parameters()]
    owned = tensor_bytes(stacks)
    forward, backward, *_ = passes.actions
    held = model.cut(share.microbatches[0])
    passes.keep(forward, loss_of(passes.forward(forward, held.tokens, held.view), held.targets) / share.counted)
    passes.backward(backward)
    gathered = sum(gathered_bytes(experts) for experts in experts_of(model))
    gradients = tensor_bytes(stack.grad for stack in stacks if stack.grad is not None)
    batches.close()
    stop_distributed()
    return gathered, gradients, owned


@pytest.mark.parametrize("axes", [{"tensor": 2}, {"shard": 2}], ids=str)
@pytest.mark.parametrize("zero", [3, 1])
def test_zero_says_what_a_rank_holds_of_experts_between_microbatches(
    folder: Path, axes: dict[str, int], zero: int
) -> None:
    """Also where nothing else is split: along tensor each rank has half of every expert."""
    job = mixture_job(folder, "mixtral", accumulation=2, layout=axes | {"zero": zero})
    prepare(job.data)
    for gathered, gradients, owned in run_ranks(2, held_of, job):
        assert gathered == (0 if zero == 3 else 2 * owned)
        assert gradients == (owned if zero == 3 else 0)
