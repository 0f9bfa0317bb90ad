"""Ring attention: each rank keeps its queries, and all ranks' keys and values pass by.

A sequence is cut into 2C chunks for C ranks, and rank r holds chunks r and 2C - 1 - r, an early and a late one. What
rank r sees of the chunks of rank s is then

    s = r   the causal past of each of its own tokens
    s < r   the early chunk of s, by all of its tokens; the late one is in everybody's future
    s > r   both chunks of s, by its late tokens

which is the same work in every turn and on every rank.

The whole ring is one operator to torch: the compiler leaves it alone as it is, with its transfers beside its kernels
(cut up by the compiler they would be waited for at once, and a graph break would take apart a block that selective
recompute must see whole), and what it returns can be kept by a name when a block is computed again.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from meshwright.parallel.mesh import named_group
from meshwright.parallel.pairs import Kernel, choose_kernel, plain, plain_backward, tile_rows
from meshwright.record.kineto import PREFIX

SCHEMA = "(Tensor query, Tensor key, Tensor value, Tensor? documents, int window, str group) -> (Tensor, Tensor)"
BACKWARD_SCHEMA = (
    "(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor out, Tensor log_sums, Tensor? documents, "
    "int window, str group) -> (Tensor, Tensor)"
)


class Sight(NamedTuple):
    """What tokens may see of the causal past: their own document (documents: [B, S], of the whole sequence; None: all
    of the sample), and of it the last `window` tokens (0: all)."""

    documents: Tensor | None
    window: int


class Piece(NamedTuple):
    """Some of a rank's queries and some of the keys that are passing by. seen: which of these pairs see each other;
    None: all, or the causal past."""

    rows: slice
    columns: slice
    causal: bool = False
    seen: Tensor | None = None


class Passing(NamedTuple):
    """A tensor on its way from the rank before."""

    received: Tensor
    sent: Tensor  # must live until the transfer is done
    work: dist.Work

    def wait(self) -> Tensor:
        """The tensor, once it is here."""
        self.work.wait()
        return self.received


def pass_on(tensor: Tensor, group: dist.ProcessGroup) -> Passing:
    """Send a tensor to the next rank of the ring and receive the one of the rank before, beside other work.

    One collective with one part that is not empty each way: unlike two separate messages it cannot be answered in
    another order, and a profiler sees which group it belongs to.
    """
    rank, size = group.rank(), group.size()
    sent, received = tensor.contiguous()[None], torch.empty_like(tensor, memory_format=torch.contiguous_format)[None]
    to, by = ([int(other == (rank + step) % size) for other in range(size)] for step in (1, -1))
    with record_function(PREFIX + "context"):
        work = dist.all_to_all_single(received, sent, by, to, group, async_op=True)
    assert work is not None
    return Passing(received[0], sent, work)


def pieces(query: Tensor, sight: Sight, rank: int, source: int, size: int, *, fused: bool) -> Iterator[Piece]:
    """What rank `rank` computes on the keys of `source`: as few pieces as there can be, or, plainly, in tiles."""
    chunk = query.shape[2] // 2
    everything, early, late = slice(0, 2 * chunk), slice(0, chunk), slice(chunk, 2 * chunk)
    if not fused:
        for rows, from_chunk in ((early, rank), (late, 2 * size - 1 - rank)):
            for columns, to_chunk in ((early, source), (late, 2 * size - 1 - source)):
                yield from tiles(query, sight, from_chunk, to_chunk, rows.start, columns.start)
    elif source == rank:
        yield Piece(everything, everything, causal=True)
    elif source < rank:
        yield Piece(everything, early)
    else:
        yield Piece(late, everything)


def tiles(query: Tensor, sight: Sight, from_chunk: int, to_chunk: int, row: int, column: int) -> Iterator[Piece]:
    """What queries of one chunk see of the keys of another, few rows at a time; `row` and `column` are where the
    chunks begin in what is held. Keys that no query of a tile can see are left out of it."""
    chunk = query.shape[2] // 2
    height = tile_rows(query, chunk)
    for top in range(0, chunk, height):
        first, last = from_chunk * chunk + top, from_chunk * chunk + min(top + height, chunk) - 1
        oldest = first - sight.window + 1 if sight.window else 0
        low, high = max(oldest, to_chunk * chunk), min(last, to_chunk * chunk + chunk - 1)
        if low <= high:
            shift_rows, shift_columns = row - from_chunk * chunk, column - to_chunk * chunk
            yield Piece(
                slice(first + shift_rows, last + 1 + shift_rows),
                slice(low + shift_columns, high + 1 + shift_columns),
                seen=visible(sight, slice(first, last + 1), slice(low, high + 1), query.device),
            )


def visible(sight: Sight, queries: slice, keys: slice, device: torch.device) -> Tensor:
    """Which queries see which keys, both by their places in the sequence: [Q, P], or [B, 1, Q, P]."""
    from_places = torch.arange(queries.start, queries.stop, device=device)[:, None]
    to_places = torch.arange(keys.start, keys.stop, device=device)
    seen = from_places >= to_places
    if sight.window:
        seen = seen & (from_places - to_places < sight.window)
    if sight.documents is not None:
        same = sight.documents[:, queries, None] == sight.documents[:, None, keys]
        seen = seen & same[:, None]
    return seen


def fused_kernel(query: Tensor, sight: Sight) -> Kernel | None:
    """The kernel that computes whole pieces; None where there is a mask, or none for these queries."""
    return choose_kernel(query) if sight.documents is None and not sight.window else None


@torch.library.custom_op("meshwright::ring_attention", mutates_args=(), schema=SCHEMA)
def ring_attention(
    query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None, window: int, group: str
) -> tuple[Tensor, Tensor]:
    """Causal attention of this rank's tokens to those of all ranks of the group named `group`.

    query: [B, H, S/C, E]; key, value: [B, K, S/C, E]; documents: [B, S] or None; window: tokens, 0 for all.
    Returns what is mixed, [B, H, S/C, E], and the logarithms of the sums of exponentiated scores, [B, H, S/C].
    """
    ring, sight = named_group(group), Sight(documents, window)
    kernel = fused_kernel(query, sight)
    wide = torch.promote_types(query.dtype, torch.float32)
    out = empty_mixed(query, wide).zero_()
    # Not minus infinity, from which a tile that sees nothing would make nan.
    log_sums = torch.full(query.shape[:3], torch.finfo(wide).min, dtype=wide, device=query.device)
    held = torch.stack([key, value])
    for turn in range(ring.size()):
        coming = pass_on(held, ring) if turn < ring.size() - 1 else None
        source = (ring.rank() - turn) % ring.size()
        for piece in pieces(query, sight, ring.rank(), source, ring.size(), fused=kernel is not None):
            part = query[:, :, piece.rows], held[0][:, :, piece.columns], held[1][:, :, piece.columns]
            if kernel is None:
                assert piece.seen is not None
                found = plain(*part, piece.seen)
            else:
                found = kernel.forward(*part, piece.causal)
            merge(out[:, :, piece.rows], log_sums[:, :, piece.rows], *found)
        held = held if coming is None else coming.wait()
    return out.to(query.dtype), log_sums


def merge(out: Tensor, log_sums: Tensor, more: Tensor, more_log_sums: Tensor) -> None:
    """Add what queries mix of other keys to what they have mixed, in place, each in proportion to its sum."""
    total = torch.logaddexp(log_sums, more_log_sums)
    out.mul_((log_sums - total).exp()[..., None]).add_(more * (more_log_sums - total).exp()[..., None])
    log_sums.copy_(total)


def empty_mixed(query: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, H, Q, E] laid out by token, as the output matrix wants it."""
    batch, heads, tokens, width = query.shape
    return query.new_empty(batch, tokens, heads, width, dtype=dtype).transpose(1, 2)


@ring_attention.register_fake
def _(query: Tensor, *_others: Any) -> Any:
    wide = torch.promote_types(query.dtype, torch.float32)
    return empty_mixed(query, query.dtype), query.new_empty(query.shape[:3], dtype=wide)


@torch.library.custom_op("meshwright::ring_attention_backward", mutates_args=(), schema=BACKWARD_SCHEMA)
def ring_attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sums: Tensor,
    documents: Tensor | None,
    window: int,
    group: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of this rank's queries, and of its keys and values, stacked.

    Keys and values pass by once more. Their gradients follow one turn behind, each rank adding its part, and are home
    after a whole round; they travel in fp32, as they are summed.
    """
    ring, sight = named_group(group), Sight(documents, window)
    kernel = fused_kernel(query, sight)
    wide = torch.promote_types(query.dtype, torch.float32)
    of_query = torch.zeros(query.shape, dtype=wide, device=query.device)
    held = torch.stack([key, value])
    behind: Passing | None = None
    for turn in range(ring.size()):
        coming = pass_on(held, ring) if turn < ring.size() - 1 else None
        source = (ring.rank() - turn) % ring.size()
        of_held = torch.zeros(held.shape, dtype=wide, device=held.device)
        for piece in pieces(query, sight, ring.rank(), source, ring.size(), fused=kernel is not None):
            rows, columns = (slice(None), slice(None), piece.rows), (slice(None), slice(None), piece.columns)
            part = gradient[rows], query[rows], held[0][columns], held[1][columns], out[rows], log_sums[rows]
            if kernel is None:
                assert piece.seen is not None
                found = plain_backward(*part, piece.seen)
            else:
                found = kernel.backward(*part, piece.causal)
            for whole, place, more in zip((of_query, *of_held), (rows, columns, columns), found, strict=True):
                whole[place] += more
        behind = pass_on(of_held if behind is None else of_held.add_(behind.wait()), ring)
        held = held if coming is None else coming.wait()
    assert behind is not None
    return of_query.to(query.dtype), behind.wait().to(key.dtype)


@ring_attention_backward.register_fake
def _(_gradient: Tensor, query: Tensor, key: Tensor, *_others: Any) -> Any:
    return query.new_empty(query.shape), key.new_empty((2, *key.shape))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, documents, ctx.window, ctx.group = inputs
    ctx.save_for_backward(query, key, value, *output, documents)


def _backward(ctx: Any, gradient: Tensor, _of_log_sums: Tensor) -> tuple[Tensor | None, ...]:
    *saved, documents = ctx.saved_tensors
    of_query, of_held = ring_attention_backward(gradient, *saved, documents, ctx.window, ctx.group)
    return of_query, *of_held.unbind(), None, None, None


ring_attention.register_autograd(_backward, setup_context=_keep)
# By which selective recompute knows it.
RING_ATTENTION = torch.ops.meshwright.ring_attention.default
