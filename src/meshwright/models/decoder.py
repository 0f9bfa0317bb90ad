"""The decoder. Shapes in comments: B batch, S sequence, D model, H heads, K kv heads, E head dim, F feed-forward,
V vocabulary.

Parameter names and shapes are those of spec.count.parameter_shapes; a test holds them to it. There is no state but
the parameters: no buffer that a move from the meta device could leave unfilled.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.spec import ModelSpec


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.grouped = spec.kv_heads != spec.heads
        self.query = nn.Linear(spec.d_model, spec.heads * spec.head_dim, bias=False)
        self.key = nn.Linear(spec.d_model, spec.kv_heads * spec.head_dim, bias=False)
        self.value = nn.Linear(spec.d_model, spec.kv_heads * spec.head_dim, bias=False)
        self.output = nn.Linear(spec.heads * spec.head_dim, spec.d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [B, S, D]; cos, sin: [S, E/2]."""
        query = rotate(self.split_heads(self.query(x)), cos, sin)  # [B, H, S, E]
        key = rotate(self.split_heads(self.key(x)), cos, sin)  # [B, K, S, E]
        value = self.split_heads(self.value(x))  # [B, K, S, E]
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=self.grouped)
        return self.output(mixed.transpose(1, 2).flatten(2))  # [B, S, H*E] to [B, S, D]

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, S, heads*E] to [B, heads, S, E]. Heads are counted from the shape: a rank may hold only some."""
        return x.unflatten(2, (-1, self.head_dim)).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate = nn.Linear(spec.d_model, spec.feed_forward, bias=False)
        self.up = nn.Linear(spec.d_model, spec.feed_forward, bias=False)
        self.down = nn.Linear(spec.feed_forward, spec.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] through [B, S, F] to [B, S, D]."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One decoder layer: the unit that is sharded, compiled and recomputed."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(spec.d_model, eps=spec.norm_epsilon)
        self.attention = Attention(spec)
        self.feed_forward_norm = nn.RMSNorm(spec.d_model, eps=spec.norm_epsilon)
        self.feed_forward = FeedForward(spec)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [B, S, D]; cos, sin: [S, E/2]."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Decoder(nn.Module):
    """Embedding, blocks, norm, head."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = nn.Embedding(spec.vocabulary, spec.d_model)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.layers))
        self.norm = nn.RMSNorm(spec.d_model, eps=spec.norm_epsilon)
        # A tied head has no module and no parameter of its own: two modules that share one parameter come apart when
        # a model leaves the meta device. So whoever shards the model keeps a tied embedding gathered until the head.
        self.head = None if spec.tied_embeddings else nn.Linear(spec.d_model, spec.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [B, S] int64. Returns logits [B, S, V]."""
        # Made anew in each forward: a few small kernels, and nothing to fill, move or cast.
        cos, sin = rotary_tables(torch.arange(tokens.shape[1], device=tokens.device), self.spec)  # [S, E/2]
        x = self.embedding(tokens)  # [B, S, D]
        for block in self.blocks:
            x = block(x, cos, sin)
        x = self.norm(x)
        return F.linear(x, self.embedding.weight) if self.head is None else self.head(x)  # [B, S, V]


def rotary_tables(positions: Tensor, spec: ModelSpec) -> tuple[Tensor, Tensor]:
    """cos and sin [S, E/2], fp32, of the angles that `positions` [S] turn each pair of a head's numbers by."""
    pairs = torch.arange(0, spec.head_dim, 2, device=positions.device, dtype=torch.float32)  # [E/2]
    frequencies = spec.rope_theta ** (-pairs / spec.head_dim)
    angles = positions.float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + E/2) of x [B, heads, S, E], as Hugging Face's Llama pairs them.

    Given fp32 tables, a bf16 x is turned in fp32 and rounded once: bf16 cannot tell the angles of neighbouring
    far positions apart. Compiled, that is one fused kernel and costs no memory.
    """
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def build_model(spec: ModelSpec, device: torch.device | str = "meta") -> Decoder:
    """The decoder on `device`, its parameters fp32 and not filled yet: initialize_ or a checkpoint fills them."""
    # Through the meta device, because the modules' own initial values would cost time and be thrown away.
    with torch.device("meta"):
        model = Decoder(spec)
    return model if torch.device(device).type == "meta" else model.to_empty(device=device)
