"""The one count of a model's parameters and FLOPs; planner, trainer and report all read it.

docs/counting.md derives the formulas. Tests hold them to the built model (parameters exactly) and to torch's
FlopCounterMode (FLOPs within 1%).
"""

from math import prod

import msgspec

from meshwright.spec.model import Experts, LatentAttention, ModelSpec

Shapes = dict[str, tuple[int, ...]]


def block_shapes(model: ModelSpec, layer: int | None = None) -> Shapes:
    """Name and shape of each parameter of one decoder block.

    layer: which one; by default the last, which all others equal, except where the first have no experts.
    """
    last = model.layers - 1
    dense = model.experts is None or (last if layer is None else layer) < model.experts.dense_layers
    return (
        norm_shapes(model, "attention_norm", model.d_model)
        | (latent_shapes(model, model.latent) if model.latent else attention_shapes(model))
        | norm_shapes(model, "feed_forward_norm", model.d_model)
        | (feed_forward_shapes(model) if dense or model.experts is None else expert_shapes(model, model.experts))
    )


def norm_shapes(model: ModelSpec, name: str, width: int) -> Shapes:
    """A norm's scale, and LayerNorm's shift."""
    shapes: Shapes = {f"{name}.weight": (width,)}
    return shapes | {f"{name}.bias": (width,)} if model.parts.norm == "layer" else shapes


def linear_shapes(model: ModelSpec, name: str, outputs: int, inputs: int) -> Shapes:
    """A matrix, and the family's bias."""
    shapes: Shapes = {f"{name}.weight": (outputs, inputs)}
    return shapes | {f"{name}.bias": (outputs,)} if model.parts.biases else shapes


def attention_shapes(model: ModelSpec) -> Shapes:
    """Grouped-query attention."""
    d, e = model.d_model, model.head_dim
    norms: Shapes = {"attention.query_norm.weight": (e,), "attention.key_norm.weight": (e,)}
    return (
        linear_shapes(model, "attention.query", model.heads * e, d)
        | linear_shapes(model, "attention.key", model.kv_heads * e, d)
        | linear_shapes(model, "attention.value", model.kv_heads * e, d)
        | (norms if model.parts.head_norms else {})
        | linear_shapes(model, "attention.output", d, model.heads * e)
    )


def latent_shapes(model: ModelSpec, latent: LatentAttention) -> Shapes:
    """Multi-head latent attention: down to a low rank, a norm, and up to the heads."""
    d, h = model.d_model, model.heads
    return {
        "attention.query_down.weight": (latent.query_rank, d),
        "attention.query_norm.weight": (latent.query_rank,),
        "attention.query.weight": (h * (model.head_dim + latent.rope_head_dim), latent.query_rank),
        "attention.kv_down.weight": (latent.kv_rank + latent.rope_head_dim, d),
        "attention.kv_norm.weight": (latent.kv_rank,),
        "attention.key.weight": (h * model.head_dim, latent.kv_rank),
        "attention.value.weight": (h * latent.value_head_dim, latent.kv_rank),
        "attention.output.weight": (d, h * latent.value_head_dim),
    }


def feed_forward_shapes(model: ModelSpec) -> Shapes:
    """The dense feed-forward part."""
    d, f = model.d_model, model.feed_forward
    return (
        (linear_shapes(model, "feed_forward.gate", f, d) if model.parts.gated else {})
        | linear_shapes(model, "feed_forward.up", f, d)
        | linear_shapes(model, "feed_forward.down", d, f)
    )


def expert_shapes(model: ModelSpec, experts: Experts) -> Shapes:
    """Router and experts, without biases; those of one kind are one tensor, expert by expert along its first dim."""
    d, f, x = model.d_model, experts.feed_forward, experts.count
    shared = experts.shared * f
    together: Shapes = {
        "feed_forward.shared.gate.weight": (shared, d),
        "feed_forward.shared.up.weight": (shared, d),
        "feed_forward.shared.down.weight": (d, shared),
    }
    shapes: Shapes = {
        "feed_forward.router.weight": (x, d),
        "feed_forward.experts.gate": (x, f, d),
        "feed_forward.experts.up": (x, f, d),
        "feed_forward.experts.down": (x, d, f),
    } | (together if shared else {})
    return {name: shape for name, shape in shapes.items() if model.parts.gated or ".gate" not in name}


def end_shapes(model: ModelSpec) -> tuple[Shapes, Shapes]:
    """What stands before the blocks and what after; a tied head is the embedding, counted once."""
    before: Shapes = {"embedding.weight": (model.vocabulary, model.d_model)}
    if model.parts.positions == "learned":
        before["positions.weight"] = (model.max_positions, model.d_model)
    after = norm_shapes(model, "norm", model.d_model)
    return before, after if model.tied_embeddings else after | {"head.weight": (model.vocabulary, model.d_model)}


def parameter_shapes(model: ModelSpec) -> Shapes:
    """Name and shape of every parameter, in the built model's order."""
    before, after = end_shapes(model)
    shapes = dict(before)
    for layer in range(model.layers):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block_shapes(model, layer).items()}
    return shapes | after


def home_of(model: ModelSpec, name: str) -> str:
    """The parameter of the whole model that one of this name is: itself, or what it is a copy of.

    A tied head is the embedding, and has a copy of it where the two lie in different stages of a pipeline.
    """
    return "embedding.weight" if model.tied_embeddings and name == "head.weight" else name


def count_parameters(model: ModelSpec) -> int:
    """Number of parameters."""
    # Blocks are alike, but for first ones without experts: two are counted, whatever the number of layers.
    dense = model.experts.dense_layers if model.experts else 0
    first, last = elements(block_shapes(model, 0)), elements(block_shapes(model))
    return dense * first + (model.layers - dense) * last + sum(map(elements, end_shapes(model)))


def elements(shapes: Shapes) -> int:
    """Elements of all of them."""
    return sum(prod(shape) for shape in shapes.values())


class Flops(msgspec.Struct, frozen=True, kw_only=True):
    """FLOPs of one forward pass over one sequence; a multiplication and an addition count as two.

    Matrix products only, as is customary: norms, rotations and activations are left out. Attention is counted
    over the full square, not the causal half.
    """

    block_matmul: int
    block_attention: int
    head: int
    layers: int

    def forward(self) -> int:
        """The whole model."""
        return self.layers * (self.block_matmul + self.block_attention) + self.head

    def training(self) -> int:
        """Forward and backward: the backward pass has two products for each of the forward's."""
        return 3 * self.forward()


def count_flops(model: ModelSpec, sequence: int) -> Flops:
    """FLOPs of one forward pass over one sequence of `sequence` tokens."""
    dense = model.experts.dense_layers if model.experts else 0
    active = dense * active_elements(model, 0) + (model.layers - dense) * active_elements(model)
    # Scores (S x query and key width times its transpose) and the weighted sum of values, for each query head.
    widths = 2 * model.head_dim
    if model.latent:
        widths = model.head_dim + model.latent.rope_head_dim + model.latent.value_head_dim
    return Flops(
        # The mean over blocks, which are alike but for first ones without experts.
        block_matmul=2 * sequence * active // model.layers,
        block_attention=2 * model.heads * widths * sequence * sequence,
        head=2 * sequence * model.d_model * model.vocabulary,
        layers=model.layers,
    )


def active_elements(model: ModelSpec, layer: int | None = None) -> int:
    """Elements of a block's matrices that one token is multiplied with: of routed experts, per_token of them."""
    shapes = block_shapes(model, layer)
    matrices = sum(prod(shape) for shape in shapes.values() if len(shape) == 2)
    stacked = sum(prod(shape) for shape in shapes.values() if len(shape) == 3)
    return matrices + (stacked * model.experts.per_token // model.experts.count if model.experts else 0)
