"""What the context and expert axes can divide: sequences, heads and experts."""

from math import gcd

from meshwright.spec.errors import SettingError
from meshwright.spec.layout import Layout
from meshwright.spec.model import ModelSpec
from meshwright.spec.numbers import nearest_divisor


def check_context(layout: Layout, model: ModelSpec, sequence: int) -> None:
    """Raise SettingError where ranks of the context axis cannot divide a sequence."""
    size, form = layout.context, layout.context_form
    if size == 1:
        if form != "ring":
            reason = "means nothing with layout.context = 1"
            raise SettingError(f'layout.context_form = "{form}"', reason, "leave it out, or layout.context = 2")
        return
    reason = context_refusal(layout, size, model, sequence)
    if reason:
        near = next(fewer for fewer in range(size, 0, -1) if not context_refusal(layout, fewer, model, sequence))
        parts = 2 * size * layout.tensor
        up = -(-sequence // parts) * parts
        other = f", or data.sequence = {up}" if sequence % parts else ', or layout.context_form = "ring"'
        raise SettingError(f"layout.context = {size}", reason, f"layout.context = {near}{other}")


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
    size = layout.expert
    if size == 1:
        return
    if model.experts is None:
        raise SettingError(f"layout.expert = {size}", f"{model.family} has no experts", "layout.expert = 1")
    count, ranks = model.experts.count, layout.shard * layout.context * layout.tensor
    reason = ""
    if count % size:
        reason = f"does not divide model.experts.count = {count}"
    elif ranks % size:
        reason = f"reuses ranks of shard x context x tensor = {ranks}, which it does not divide"
    if reason:
        near = nearest_divisor(gcd(count, ranks), size)
        raise SettingError(f"layout.expert = {size}", reason, f"layout.expert = {near}")
