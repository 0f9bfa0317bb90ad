"""The decoder. Shapes in comments: B batch, S sequence, D model, H heads, K kv heads, E head dim, F feed-forward,
V vocabulary, P positions.

Parameter names and shapes are those of spec.count.parameter_shapes; a test holds them to it. Beside them there is one
kind of state, the bias that a router chooses by (models/experts.py), which is filled and saved as parameters are.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.models.attention import Attend, Mask, attend
from meshwright.models.experts import Mixture
from meshwright.models.positions import rotary_tables, rotate
from meshwright.models.view import View, build_view
from meshwright.spec import ModelSpec

Tables = tuple[Tensor, Tensor] | None


def build_norm(spec: ModelSpec, width: int) -> nn.Module:
    """The family's norm."""
    kind = nn.LayerNorm if spec.parts.norm == "layer" else nn.RMSNorm
    return kind(width, eps=spec.norm_epsilon)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        biases, width = spec.parts.biases, spec.heads * spec.head_dim
        self.query = nn.Linear(spec.d_model, width, bias=biases)
        self.key = nn.Linear(spec.d_model, spec.kv_heads * spec.head_dim, bias=biases)
        self.value = nn.Linear(spec.d_model, spec.kv_heads * spec.head_dim, bias=biases)
        # Qwen3's, over each head.
        head_norms = spec.parts.head_norms
        self.query_norm = build_norm(spec, spec.head_dim) if head_norms else None
        self.key_norm = build_norm(spec, spec.head_dim) if head_norms else None
        self.output = nn.Linear(width, spec.d_model, bias=biases)
        # Replaced where a sequence is spread over ranks.
        self.attend: Attend = attend

    def forward(self, x: Tensor, tables: Tables, mask: Mask) -> Tensor:
        """x: [B, S, D]; tables: cos and sin [S, 1, E/2] or [B, S, 1, E/2], None where positions are learned."""
        # Heads are counted from the shape: a rank may hold only some.
        query = self.query(x).unflatten(2, (-1, self.head_dim))  # [B, S, H, E]
        key = self.key(x).unflatten(2, (-1, self.head_dim))  # [B, S, K, E]
        value = self.value(x).unflatten(2, (-1, self.head_dim))  # [B, S, K, E]
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        # Before heads come before the sequence: attention's output lies as its queries do, and the next matrix wants
        # the heads of a token side by side. Turned later, that output would be kept, and copied, twice.
        if tables is not None:
            query, key = rotate(query, *tables), rotate(key, *tables)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        mixed = self.attend(query, key, value, mask)  # [B, H, S, E]
        return self.output(mixed.transpose(1, 2).flatten(2))  # [B, S, H*E] to [B, S, D]


class FeedForward(nn.Module):
    """SwiGLU, or GELU between two matrices."""

    def __init__(self, spec: ModelSpec, width: int) -> None:
        super().__init__()
        biases = spec.parts.biases
        self.gate = nn.Linear(spec.d_model, width, bias=biases) if spec.parts.gated else None
        self.up = nn.Linear(spec.d_model, width, bias=biases)
        self.down = nn.Linear(width, spec.d_model, bias=biases)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] through [B, S, F] to [B, S, D]."""
        if self.gate is None:
            return self.down(F.gelu(self.up(x), approximate="tanh"))
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One decoder layer: the unit that is sharded, compiled and recomputed."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.attention_norm = build_norm(spec, spec.d_model)
        self.attention = Attention(spec)
        self.feed_forward_norm = build_norm(spec, spec.d_model)
        self.feed_forward = FeedForward(spec, spec.feed_forward)

    def forward(self, x: Tensor, tables: Tables, mask: Mask) -> Tensor:
        """x: [B, S, D]."""
        x = x + self.attention(self.attention_norm(x), tables, mask)
        return x + self.feed_forward(self.feed_forward_norm(x))


class MixtureBlock(nn.Module):
    """One decoder layer with a mixture of experts. Its forward pass is in three parts, so that the first and the last
    can be compiled and the middle, whose shapes depend on what the router decides, left as it is."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        assert spec.experts is not None
        width = spec.experts.shared * spec.experts.feed_forward
        self.attention_norm = build_norm(spec, spec.d_model)
        self.attention = Attention(spec)
        self.feed_forward_norm = build_norm(spec, spec.d_model)
        self.feed_forward = Mixture(spec, layer, FeedForward(spec, width) if width else None)

    def forward(self, x: Tensor, tables: Tables, mask: Mask) -> Tensor:
        """x: [B, S, D]."""
        x, normed, logits = self.before_experts(x, tables, mask)
        routed = self.feed_forward.experts(normed, logits, self.feed_forward.router.bias)
        return self.after_experts(x, normed, routed)

    def before_experts(self, x: Tensor, tables: Tables, mask: Mask) -> tuple[Tensor, Tensor, Tensor]:
        """Attention; then what the experts are given, and their logits [B, S, X]."""
        x = x + self.attention(self.attention_norm(x), tables, mask)
        normed = self.feed_forward_norm(x)
        return x, normed, self.feed_forward.router(normed)

    def after_experts(self, x: Tensor, normed: Tensor, routed: Tensor) -> Tensor:
        """The shared experts, and all of it added up."""
        shared = self.feed_forward.shared
        return x + routed if shared is None else x + (routed + shared(normed))


def build_block(spec: ModelSpec, layer: int) -> nn.Module:
    """A layer's block: all are alike, but that a mixture's first ones may have no experts."""
    return Block(spec) if spec.is_dense(layer) else MixtureBlock(spec, layer)


class Head(nn.Module):
    """Logits. Tied, it has no parameter of its own and is given the embedding's.

    Two modules that share one parameter would come apart when a model leaves the meta device. So whoever shards the
    model keeps a tied embedding gathered until the head.
    """

    def __init__(self, spec: ModelSpec, *, given: bool) -> None:
        super().__init__()
        self.weight: nn.Parameter | None = None
        if not given:
            self.weight = nn.Parameter(torch.empty(spec.vocabulary, spec.d_model))
        # Replaced where its weight's gradient is not computed at once.
        self.product: Callable[[Tensor, Tensor], Tensor] = F.linear

    def forward(self, x: Tensor, tied: Tensor | None) -> Tensor:
        """x: [B, S, D]; tied: [V, D] where the head is given the embedding's weight. Returns [B, S, V]."""
        weight = self.weight if tied is None else tied
        assert weight is not None
        return self.product(x, weight)


class Decoder(nn.Module):
    """Embedding, blocks, norm, head; or one stage of a pipeline: blocks `start` to `stop` and the ends beside them.

    Modules are named as in the whole model. A last stage that is not the first has a tied head's weight of its own,
    a copy of the embedding's.
    """

    def __init__(self, spec: ModelSpec, start: int = 0, stop: int | None = None) -> None:
        super().__init__()
        self.spec = spec
        stop = spec.layers if stop is None else stop
        first, last = start == 0, stop == spec.layers
        learned = spec.parts.positions == "learned"
        self.embedding = nn.Embedding(spec.vocabulary, spec.d_model) if first else None
        self.positions = nn.Embedding(spec.max_positions, spec.d_model) if first and learned else None
        self.blocks = nn.ModuleDict({str(layer): build_block(spec, layer) for layer in range(start, stop)})
        self.norm = build_norm(spec, spec.d_model) if last else None
        self.head = Head(spec, given=first and spec.tied_embeddings) if last else None

    def forward(self, x: Tensor, view: View | None = None) -> Tensor:
        """x: tokens [B, S] int64, or [B, S, D] as the stage before gave it. Returns logits [B, S, V], or [B, S, D].

        view: where each token stands and what it sees; without, it sees all that comes before it in its sample.
        """
        if view is None:
            view = build_view(self.spec, x.shape[1], None, x.device)
        if self.embedding is not None:
            tokens, x = x, self.embedding(x)  # [B, S, D]
            if self.positions is not None:
                x = x + self.positions(view.places.expand_as(tokens))
        tables = None
        if self.spec.parts.positions == "rotary":
            # Made anew in each forward: a few small kernels, and nothing to fill, move or cast.
            tables = rotary_tables(view.places, self.spec)
        for block in self.blocks.values():
            x = block(x, tables, view.mask)
        if self.norm is None or self.head is None:
            return x
        tied = self.embedding.weight if self.embedding is not None and self.spec.tied_embeddings else None
        return self.head(self.norm(x), tied)


def build_model(
    spec: ModelSpec, device: torch.device | str = "meta", start: int = 0, stop: int | None = None
) -> Decoder:
    """The decoder, or its blocks `start` to `stop` with the end that adjoins them, on `device`.

    Its parameters are fp32 and not filled yet: initialize_ or a checkpoint fills them.
    """
    # Through the meta device, because the modules' own initial values would cost time and be thrown away.
    with torch.device("meta"):
        model = Decoder(spec, start, stop)
    return model if torch.device(device).type == "meta" else model.to_empty(device=device)
