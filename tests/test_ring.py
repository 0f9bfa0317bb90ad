"""Attention over a sequence that ranks share equals attention over the whole of it."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from meshwright.models import attend, build_mask
from meshwright.parallel import build_mesh, ring, start_distributed, stop_distributed
from meshwright.parallel.context import attend_over, held_tokens
from meshwright.spec import Layout

# --- As a function --------------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """Of one call of attention."""

    heads: int = 4
    kv_heads: int = 2
    sequence: int = 48
    width: int = 8
    window: int = 0
    documents: bool = False
    dtype: torch.dtype = torch.float64


def inputs(shape: Shape) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Query, key and value, a gradient of the output, and documents; the same on every rank."""
    torch.manual_seed(7)
    batch = 2
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    parts = [torch.randn(batch, h, shape.sequence, shape.width, dtype=torch.float64) for h in heads]
    gradient = torch.randn(batch, shape.heads, shape.sequence, shape.width, dtype=torch.float64)
    # Documents that begin at other places in each sample, inside of chunks and at their edges.
    begins = torch.zeros(batch, shape.sequence, dtype=torch.int32)
    begins[0, [5, 6, shape.sequence // 2]] = 1
    begins[1, [shape.sequence // 4, shape.sequence - 1]] = 1
    documents = begins.cumsum(1).int() if shape.documents else None
    return parts, gradient, documents


def whole_attention(shape: Shape) -> list[Tensor]:
    """What is mixed, and the gradients of query, key and value, in double precision on one rank."""
    parts, gradient, documents = inputs(shape)
    leaves = [part.requires_grad_() for part in parts]
    mask = build_mask(shape.sequence, documents, shape.window, torch.device("cpu"))
    mixed = attend(leaves[0], leaves[1], leaves[2], mask)
    mixed.backward(gradient)
    return [mixed.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def shared_attention(shapes: list[Shape], size: int, form: Any, patches: dict[str, Any]) -> list[list[Tensor]]:
    """The same of this rank's tokens, by a form of context, for each shape."""
    torch.set_num_threads(1)
    device = start_distributed()
    layout = Layout(context=size, context_form=form)
    mesh = build_mesh(layout, device)["context"]
    found: list[list[Tensor]] = []
    for shape in shapes:
        parts, gradient, documents = inputs(shape)
        held = held_tokens(shape.sequence, size, mesh.get_local_rank(), device)
        leaves = [part[:, :, held].to(shape.dtype).requires_grad_() for part in parts]
        mask = documents if form == "ring" else build_mask(shape.sequence, documents, shape.window, device)
        with ExitStack() as patched:
            for name, function in patches.items():
                patched.enter_context(mock.patch.object(ring, name, function))
            mixed = attend_over(layout, mesh, shape.window)(leaves[0], leaves[1], leaves[2], mask)
            mixed.backward(gradient[:, :, held].to(shape.dtype))
        found.append([mixed.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    stop_distributed()
    return found


def together(parts: list[Tensor]) -> Tensor:
    """A tensor [B, heads, S, E] from the ranks' tokens of it: chunks from the start, then the others from the end."""
    chunks = [part.chunk(2, dim=2) for part in parts]
    return torch.cat([*(early for early, _ in chunks), *(late for _, late in reversed(chunks))], dim=2)


def assert_same_attention(shapes: list[Shape], size: int, form: str, patches: dict[str, Any] | None = None) -> None:
    """Fail where what ranks mix, or a gradient, differs from one rank's."""
    ranks = run_ranks(size, shared_attention, shapes, size, form, patches or {})
    for number, shape in enumerate(shapes):
        expected = whole_attention(shape)
        assert len(expected) == 4
        found = zip(*(rank[number] for rank in ranks), strict=True)
        for what, wanted, parts in zip(("mixed", "query", "key", "value"), expected, found, strict=True):
            assert all(part.dtype == shape.dtype for part in parts)
            difference = (together(list(parts)).double() - wanted).norm() / wanted.norm()
            bounds = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}
            assert difference < bounds[shape.dtype], (form, size, shape, what)


MASKS: list[dict[str, Any]] = [{}, {"documents": True}, {"window": 7}, {"window": 30, "documents": True}]
PRECISIONS = (torch.float64, torch.float32)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("form", ["ring", "all-to-all"])
def test_attention_of_sharing_ranks_is_that_of_one(form: str, size: int) -> None:
    heads = [(size, 1), (size, size), (2 * size, 2)]
    shapes = [Shape(heads=h, kv_heads=k, dtype=d, **mask) for h, k in heads for d in PRECISIONS for mask in MASKS]
    assert_same_attention(shapes, size, form)


def test_a_ring_needs_no_head_for_each_rank() -> None:
    assert_same_attention([Shape(heads=3, kv_heads=1), Shape(heads=1, kv_heads=1, documents=True)], 4, "ring")


def test_small_tiles_are_put_together() -> None:
    # Neither divides the 12 queries of a chunk.
    for rows in (1, 5):
        assert_same_attention([Shape(**mask) for mask in MASKS], 2, "ring", {"tile_rows": lambda *_, rows=rows: rows})


def test_heads_that_no_kernel_takes_are_computed_plainly() -> None:
    assert_same_attention([Shape(dtype=dtype) for dtype in PRECISIONS], 3, "ring", {"choose_kernel": lambda _: None})


def test_sixteen_bits_round_no_more_than_themselves() -> None:
    assert_same_attention([Shape(dtype=torch.bfloat16), Shape(dtype=torch.bfloat16, documents=True)], 2, "ring")


def computed(rank: int, size: int, sight: ring.Sight, chunk: int, *, fused: bool) -> Iterator[tuple[int, int, int]]:
    """Every turn of a ring, and the pairs of tokens of which a rank computes there what is seen."""
    query = torch.empty(1, 1, 2 * chunk, 4)
    for source in range(size):
        of_queries, of_keys = (held_tokens(2 * size * chunk, size, r, torch.device("cpu")) for r in (rank, source))
        for piece in ring.pieces(query, sight, rank, source, size, fused=fused):
            rows, columns = of_queries[piece.rows], of_keys[piece.columns]
            seen = torch.ones(len(rows), len(columns), dtype=torch.bool) if piece.seen is None else piece.seen
            if piece.causal:
                seen = seen.tril()
            yield from ((source, rows[i].item(), columns[j].item()) for i, j in seen.nonzero().tolist())  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize(("window", "fused"), [(0, True), (0, False), (9, False)])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_compute_every_visible_pair_once_and_equally_many(size: int, window: int, fused: bool) -> None:
    chunk = 6
    found = [list(computed(rank, size, ring.Sight(None, window), chunk, fused=fused)) for rank in range(size)]
    pairs_seen = sorted((query, key) for rank in found for _, query, key in rank)
    past = [(q, k) for q in range(2 * size * chunk) for k in range(q + 1) if not window or q - k < window]
    assert pairs_seen == past
    if window:
        return
    for rank, each in enumerate(found):
        turns = [sum(source == turn for turn, *_ in each) for source in range(size)]
        # In its own turn the diagonals of two chunks too.
        assert turns == [2 * chunk**2 + (chunk if source == rank else 0) for source in range(size)]
