"""Attention over ranks of context against attention on one rank, and against torch's own context_parallel.

    torchrun --nproc-per-node 2 benchmarks/context_check.py [--sequence 4096] [--long 131072]

First exactness: what ranks mix and the gradients of queries, keys and values, each against one rank's in fp32, by
relative norm; the column "one rank" is what the precision alone does there. Then speed: a forward and a backward pass
over one long sequence with Llama-3 8B's heads (0 leaves it out). Where torch's does not run, its error is shown.
Without GPUs it runs on CPU processes, in fp32.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.experimental import context_parallel

from meshwright.models import Mask, attend, build_mask
from meshwright.parallel import build_mesh, start_distributed, stop_distributed
from meshwright.parallel.context import attend_over, held_tokens
from meshwright.spec import ContextForm, Layout

FORMS: tuple[ContextForm, ...] = ("ring", "all-to-all")
REPEATS = 5

# Query, key and value, to what is mixed of them.
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Case(NamedTuple):
    """What attention is over."""

    name: str
    dtype: torch.dtype
    kv_heads: int = 8
    documents: bool = False
    window: int = 0


def cases(device: torch.device) -> list[Case]:
    """Each kernel, and each kind of mask."""
    precisions = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    found: list[Case] = []
    for dtype in precisions:
        name = str(dtype).removeprefix("torch.")
        found += [Case(name, dtype), Case(f"{name}, 2 key heads", dtype, kv_heads=2)]
        found += [Case(f"{name}, documents", dtype, documents=True), Case(f"{name}, window", dtype, window=1000)]
    return found


def draw(case: Case, sequence: int, device: torch.device, heads: int = 8, width: int = 64) -> list[Tensor]:
    """Query, key, value and the gradient of what is mixed, the same on every rank."""
    generator = torch.Generator(device).manual_seed(1)
    shapes = [(1, count, sequence, width) for count in (heads, case.kv_heads, case.kv_heads, heads)]
    return [torch.randn(shape, generator=generator, device=device).to(case.dtype) for shape in shapes]


def document_numbers(sequence: int, device: torch.device) -> Tensor:
    """Documents of three lengths, [1, S]."""
    places = torch.arange(sequence, device=device)
    return sum(((places > sequence * part // 16).int() for part in (1, 9)), torch.zeros_like(places).int())[None]


def attention_of(form: ContextForm, mesh: DeviceMesh, window: int, mask: Mask) -> Attention:
    """Ours over the ranks of a mesh."""
    ours = attend_over(Layout(context=mesh.size(), context_form=form), mesh, window)
    return lambda query, key, value: ours(query, key, value, mask)


def run(attention: Attention, tensors: list[Tensor]) -> list[Tensor]:
    """What is mixed and the gradients, of query, key, value and the gradient of what is mixed."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors[:3]]
    mixed = attention(leaves[0], leaves[1], leaves[2])
    mixed.backward(tensors[3])
    return [mixed.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def run_torch(mesh: DeviceMesh, tensors: list[Tensor]) -> list[Tensor]:
    """The same by torch's context_parallel, which cuts sequences as we do."""
    parts = [tensor.clone() for tensor in tensors]
    with context_parallel(mesh, buffers=parts, buffer_seq_dims=[2] * 4, no_restore_buffers=set(parts)):
        return run(partial(F.scaled_dot_product_attention, is_causal=True), parts)


def worst(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest relative difference over what is mixed and the gradients, over all ranks."""
    apart = [(ours.double() - theirs.double()).square().sum() for ours, theirs in zip(found, wanted, strict=True)]
    sums = torch.stack([*apart, *(theirs.double().square().sum() for theirs in wanted)])
    dist.all_reduce(sums)
    differences, norms = sums.sqrt().chunk(2)
    return (differences / norms).max().item()


def compare(case: Case, sequence: int, mesh: DeviceMesh, device: torch.device) -> list[str]:
    """A row of the table of differences."""
    tensors = draw(case, sequence, device)
    held = held_tokens(sequence, mesh.size(), mesh.get_local_rank(), device)
    documents = document_numbers(sequence, device) if case.documents else None
    mask = build_mask(sequence, documents, case.window, device)
    exact = run(lambda q, k, v: attend(q, k, v, mask), [tensor.float() for tensor in tensors])
    exact = [tensor[:, :, held] for tensor in exact]
    alone = run(lambda q, k, v: attend(q, k, v, mask), tensors)
    row = [case.name, f"{worst([tensor[:, :, held] for tensor in alone], exact):.1e}"]
    mine = [tensor[:, :, held] for tensor in tensors]
    for form in FORMS:
        attention = attention_of(form, mesh, case.window, documents if form == "ring" else mask)
        row.append(f"{worst(run(attention, mine), exact):.1e}")
    masked = case.documents or case.window or case.kv_heads != 8
    row.append("-" if masked else attempt(lambda: f"{worst(run_torch(mesh, tensors), exact):.1e}"))
    return row


def attempt(measure: Callable[[], str]) -> str:
    """What it says, or why it did not run: torch's may not, and that is what we want to know."""
    try:
        return measure()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """The median time of one call, after one that is not counted."""
    taken: list[float] = []
    for _ in range(REPEATS + 1):
        dist.barrier()
        wait_for(device)
        start = time.perf_counter()
        work()
        wait_for(device)
        taken.append(time.perf_counter() - start)
    return sorted(taken[1:])[REPEATS // 2]


def wait_for(device: torch.device) -> None:
    """Until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_long(sequence: int, mesh: DeviceMesh, device: torch.device) -> list[list[str]]:
    """Rows of forward and backward passes over one long sequence."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows: list[list[str]] = []
    held = held_tokens(sequence, mesh.size(), mesh.get_local_rank(), device)
    for kv_heads in (8, 32):
        tensors = draw(Case("", dtype, kv_heads=kv_heads), sequence, device, heads=32, width=128)
        mine = [tensor[:, :, held].contiguous() for tensor in tensors]
        calls = [partial(run, attention_of(form, mesh, 0, None), mine) for form in FORMS]
        row = [f"32 heads, {kv_heads} key heads", *(shown_time(call, device) for call in calls)]
        # torch's wants as many key heads as query heads.
        theirs = partial(shown_time, partial(run_torch, mesh, tensors), device)
        rows.append([*row, attempt(theirs) if kv_heads == 32 else "-"])
    return rows


def shown_time(work: Callable[[], Any], device: torch.device) -> str:
    """Of one call."""
    return f"{seconds(work, device) * 1e3:.1f} ms"


def show(head: list[str], rows: list[list[str]]) -> None:
    """Print a table, on rank 0."""
    if dist.get_rank():
        return
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(flush=True)


def main() -> None:
    """Run both parts on this process's rank."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--long", type=int, default=131072)
    given = parser.parse_args()
    device = start_distributed()
    torch.backends.cuda.matmul.allow_tf32 = False
    mesh = build_mesh(Layout(context=dist.get_world_size()), device)["context"]
    rows = [compare(case, given.sequence, mesh, device) for case in cases(device)]
    show(["relative difference", "one rank", *FORMS, "torch's"], rows)
    if given.long:
        show([f"{given.long} tokens", *FORMS, "torch's"], time_long(given.long, mesh, device))
    stop_distributed()


if __name__ == "__main__":
    main()
