"""What the context and expert axes can divide: sequences, heads and experts."""

import msgspec

from meshwright.spec.errors import SettingError
from meshwright.spec.layout import Layout
from meshwright.spec.model import ModelSpec


def check_context(layout: Layout, model: ModelSpec, sequence: int) -> None:
    """Raise SettingError where ranks of the context axis cannot divide a sequence."""
    size, form = layout.context, layout.context_form
    if size == 1:
        if form != "ring":
            reason = "means nothing with layout.context = 1"
            offers = ([{"layout.context_form": "ring"}], [{"layout.context": 2}])
            raise SettingError(f'layout.context_form = "{form}"', reason, offers=offers)
        return
    reason = context_refusal(layout, size, model, sequence)
    if reason:
        raise SettingError(f"layout.context = {size}", reason, nearest_context(layout, model, sequence))


def nearest_context(layout: Layout, model: ModelSpec, sequence: int) -> str:
    """What would work in place of a refused `layout.context`; each of these is let through as it stands."""
    size, form, parts = layout.context, layout.context_form, 2 * layout.context * layout.tensor
    near = next(fewer for fewer in range(size, 0, -1) if not context_refusal(layout, fewer, model, sequence))
    up = -(-sequence // parts) * parts
    ring = msgspec.structs.replace(layout, context_form="ring")
    ways: list[str] = []
    if near > 1 or form == "ring":
        ways.append(f"layout.context = {near}")
    meant = not 0 < model.max_positions < up
    if sequence % parts and meant and not context_refusal(layout, size, model, up):
        ways.append(f"data.sequence = {up}")
    if form != "ring" and not context_refusal(ring, size, model, sequence):
        ways.append('layout.context_form = "ring"')
    return ", or ".join(ways) or "layout.context = 1 without layout.context_form"


def context_refusal(layout: Layout, size: int, model: ModelSpec, sequence: int) -> str:
    """Why `size` ranks cannot share a sequence; "" where they can. One always can.

    Each has two pieces of it, one from either end: a token late in a sequence attends to more than an early one.
    """
    parts = 2 * size * layout.tensor
    if size > 1 and sequence % parts:
        return f"cuts data.sequence = {sequence} into 2 x context x tensor = {parts} pieces, which are not equal"
    if layout.context_form == "all-to-all" and model.heads % (size * layout.tensor):
        return f"times layout.tensor = {layout.tensor} does not divide model.heads = {model.heads}"
    return ""


def check_expert(layout: Layout, model: ModelSpec) -> None:
    """Raise SettingError where ranks of the expert axis cannot divide a model's experts."""
    reason = expert_refusal(layout, layout.expert, model)
    if reason:
        fits = [size for size in range(1, layout.expert_ranks + 1) if not expert_refusal(layout, size, model)]
        near = min(fits, key=lambda size: abs(size - layout.expert), default=0)
        nearest = f"layout.expert = {near}" if near else "fewer ranks along shard, context and tensor"
        raise SettingError(f"layout.expert = {layout.expert}", reason, nearest)


def expert_refusal(layout: Layout, size: int, model: ModelSpec) -> str:
    """Why `size` ranks cannot divide the experts, and the others each expert; "" where they can."""
    experts, ranks = model.experts, layout.expert_ranks
    if experts is None:
        return f"{model.family} has no experts" if size > 1 else ""
    if experts.count % size:
        return f"does not divide model.experts.count = {experts.count}"
    if ranks % size:
        return f"reuses ranks of shard x context x tensor = {ranks}, which it does not divide"
    # FSDP splits a dim that is not the first evenly or not at all; either of a matrix's own two will do.
    parts = ranks // size
    if experts.feed_forward % parts and model.d_model % parts:
        widths = f"model.experts.feed_forward = {experts.feed_forward} nor model.d_model = {model.d_model}"
        return f"leaves {parts} ranks to divide each expert's matrices, which divide neither {widths}"
    return ""


def expert_dim(rows: int, ranks: int) -> int:
    """The dim of stacked matrices [X, rows, columns] that ranks divide: rows, or where that is uneven the columns."""
    return 2 if rows % ranks else 1
