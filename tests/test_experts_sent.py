"""What a rank sends of a mixture, and what it holds of it between microbatches."""

from collections import Counter
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
from meshwright.parallel.recompute import again, selective_contexts
from meshwright.spec import Job
from meshwright.trace.memory import gathered_bytes, tensor_bytes
from meshwright.train.setup import build_batches, open_data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_text(tmp_path)
    return tmp_path


def operators_of(job: Job) -> Counter[str]:
    """How often a rank runs each operator in one forward and backward pass."""
    torch.set_num_threads(1)
    device = start_distributed(job.cluster)
    mesh = build_mesh(job.layout, device)
    stage = build_parallel_model(job, mesh, device).parts[0]
    seen = Counter[str]()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen[str(func)] += 1
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
    seen = run_ranks(2, operators_of, job)
    assert [ours["_c10d_functional.all_to_all_single.default"] for ours in seen] == [2 * (5 + more)] * 2


def test_selective_recompute_sends_sums_and_sorts_nothing_of_a_mixture_again(folder: Path) -> None:
    """Nor what the balance loss sums along tensor."""
    axes = {"tensor": 2, "expert": 2}
    jobs = [mixture_job(folder, "mixtral", layout=axes | {"recompute": policy}) for policy in ("none", "selective")]
    kept, again = (run_ranks(2, operators_of, job)[0] for job in jobs)
    # A wait for what is kept is over at once.
    sent = [name for name in kept if name.startswith("_c10d_functional.") and "wait" not in name and "wrap" not in name]
    dear = [*sent, "aten.sort.stable"]
    assert kept["_c10d_functional.all_reduce.default"] and kept["aten.sort.stable"]
    assert {name: again[name] for name in dear} == {name: kept[name] for name in dear}


def test_selective_recompute_asks_the_device_for_nothing_again() -> None:
    """What the host has read of a device, here one that only knows shapes, is not waited for a second time."""
    reads = 0

    class Read(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal reads
            read = func is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("cpu")
            reads += read
            return torch.zeros(args[0].shape) if read else func(*args, **(kwargs or {}))

    def sized(x: torch.Tensor) -> torch.Tensor:
        hidden = x.sin()
        rows = len(hidden.detach().tolist())
        return (hidden * rows).exp()

    x = torch.zeros(3, device="meta", requires_grad=True)
    with Read():
        again(sized, selective_contexts, False, x).sum().backward()
    assert reads == 1


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


@pytest.mark.parametrize("axes", [{"tensor": 2}, {"shard": 2}], ids=str)
@pytest.mark.parametrize("zero", [3, 2, 1])
def test_experts_that_are_whole_on_their_rank_are_not_gathered(folder: Path, axes: dict[str, int], zero: int) -> None:
    """Whatever zero says: a rank computes with its own experts, and their gradients wait for the last microbatch."""
    job = mixture_job(folder, "mixtral", accumulation=2, layout=axes | {"expert": 2, "zero": zero})
    prepare(job.data)
    for gathered, gradients, owned in run_ranks(2, held_of, job):
        assert (gathered, gradients) == (owned, 0)
