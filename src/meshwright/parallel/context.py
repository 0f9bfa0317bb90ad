"""The context axis: each sequence cut over ranks, which attend to each other's tokens.

Of 2C chunks of a sequence rank r holds r and 2C - 1 - r, so that every rank has as much causal past to look at. Only
attention looks past a token, so only attention knows of the axis: modules of ours call a function for it, which is
replaced here. What the loss adds up and what gradients sum is of a rank's own tokens; parameters are sharded over the
axis, and FSDP sums there.
"""

from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from meshwright.models import Attend, Attention, Mask, View, build_mask, place_tokens
from meshwright.parallel.exchange import attend_whole
from meshwright.parallel.mesh import own_group
from meshwright.parallel.ring import ring_attention
from meshwright.spec import Layout, ModelSpec


class Samples(Protocol):
    """Whole samples: tokens and targets [B, S] int64; documents [B, S] int32 as build_view has them, or None."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def targets(self) -> Tensor: ...
    @property
    def documents(self) -> Tensor | None: ...


class LocalBatch(NamedTuple):
    """What one rank works on of some samples: its tokens and their targets, [B, S/C], and the view of them."""

    tokens: Tensor
    targets: Tensor
    view: View


def cut_sequence(batch: Samples, spec: ModelSpec, layout: Layout, mesh: DeviceMesh) -> LocalBatch:
    """This rank's tokens of whole samples; all of them where there is one rank along context."""
    tokens, targets, documents = batch.tokens, batch.targets, batch.documents
    size, rank, sequence = layout.context, mesh["context"].get_local_rank(), tokens.shape[1]
    places = place_tokens(sequence, documents, tokens.device)
    if size == 1 or layout.context_form == "all-to-all":
        mask = build_mask(sequence, documents, spec.attention_window, tokens.device)
    else:
        # The ring's pieces make their masks themselves, of the documents of the whole sequence.
        mask = documents
    if size == 1:
        return LocalBatch(tokens, targets, View(places, mask))
    held = held_tokens(sequence, size, rank, tokens.device)
    return LocalBatch(tokens[:, held], targets[:, held], View(cut_places(places, held), mask))


def held_tokens(sequence: int, size: int, rank: int, device: torch.device) -> Tensor:
    """Where the tokens of a rank stand in the sequence, [S/C]: its early chunk, then its late one."""
    chunks = torch.arange(sequence, device=device).chunk(2 * size)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


def cut_places(places: Tensor, held: Tensor) -> Tensor:
    """The places of the tokens held, of those of the whole sequence: [S/C] of [S], or [B, S/C] of [B, S]."""
    return places[..., held]


def apply_context(model: nn.Module, layout: Layout, mesh: DeviceMesh, window: int) -> None:
    """Let the model's attention reach over the ranks of a one-dimensional mesh. window: the model's, 0 for none."""
    attend = attend_over(layout, mesh, window)
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = attend


def attend_over(layout: Layout, mesh: DeviceMesh, window: int) -> Attend:
    """The attention of the layout's form."""
    group = own_group(mesh, "context").group_name
    if layout.context_form == "ring":
        return partial(attend_in_ring, window, group)
    return partial(attend_whole, mesh.size(), group)


def attend_in_ring(window: int, group: str, query: Tensor, key: Tensor, value: Tensor, documents: Mask) -> Tensor:
    """query: [B, H, S/C, E]; key, value: [B, K, S/C, E]; documents: [B, S] or None. Returns [B, H, S/C, E]."""
    assert documents is None or isinstance(documents, Tensor)
    mixed, _ = ring_attention(query, key, value, documents, window, group)
    return mixed
