"""The one count of a model's parameters and FLOPs; planner, trainer and report all read it.

docs/counting.md derives the formulas. Tests hold them to the built model (parameters exactly) and to torch's
FlopCounterMode (FLOPs within 1%).
"""

from math import prod

import msgspec

from meshwright.spec.model import ModelSpec


def block_shapes(model: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of each parameter of one decoder block."""
    d, e = model.d_model, model.head_dim
    return {
        "attention_norm.weight": (d,),
        "attention.query.weight": (model.heads * e, d),
        "attention.key.weight": (model.kv_heads * e, d),
        "attention.value.weight": (model.kv_heads * e, d),
        "attention.output.weight": (d, model.heads * e),
        "feed_forward_norm.weight": (d,),
        "feed_forward.gate.weight": (model.feed_forward, d),
        "feed_forward.up.weight": (model.feed_forward, d),
        "feed_forward.down.weight": (d, model.feed_forward),
    }


def parameter_shapes(model: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, in the built model's order; a tied head is the embedding, counted once."""
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (model.vocabulary, model.d_model)}
    for layer in range(model.layers):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block_shapes(model).items()}
    shapes["norm.weight"] = (model.d_model,)
    if not model.tied_embeddings:
        shapes["head.weight"] = (model.vocabulary, model.d_model)
    return shapes


def count_parameters(model: ModelSpec) -> int:
    """Number of parameters."""
    block = sum(prod(shape) for shape in block_shapes(model).values())
    embeddings = (1 if model.tied_embeddings else 2) * model.vocabulary * model.d_model
    return model.layers * block + embeddings + model.d_model


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
    matrices = sum(prod(shape) for shape in block_shapes(model).values() if len(shape) == 2)
    return Flops(
        block_matmul=2 * sequence * matrices,
        # Scores (S x E times E x S) and the weighted sum (S x S times S x E), for each query head.
        block_attention=2 * 2 * model.heads * model.head_dim * sequence * sequence,
        head=2 * sequence * model.d_model * model.vocabulary,
        layers=model.layers,
    )
