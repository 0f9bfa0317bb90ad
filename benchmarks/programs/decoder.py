"""A decoder of the Llama shape in plain PyTorch. It may hold only some of the layers: a pipeline's stage."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import Shape

ROTARY_BASE = 500_000.0


def rotation(sequence: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, sequence x head dim."""
    frequencies = ROTARY_BASE ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(sequence).float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of halves by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).type_as(x)


class Attention(nn.Module):
    """Grouped-query attention. The number of heads follows from the projections' widths, which may be shares."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.dim // shape.heads
        self.query = nn.Linear(shape.dim, shape.heads * self.head_dim, bias=False)
        self.key = nn.Linear(shape.dim, shape.kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(shape.dim, shape.kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(shape.heads * self.head_dim, shape.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query, key, value = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        heads = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.out(heads.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.dim, shape.feed_forward, bias=False)
        self.up = nn.Linear(shape.dim, shape.feed_forward, bias=False)
        self.down = nn.Linear(shape.feed_forward, shape.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.dim)
        self.attention = Attention(shape)
        self.feed_forward_norm = nn.RMSNorm(shape.dim)
        self.feed_forward = FeedForward(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Decoder(nn.Module):
    """The layers of one stage, the embedding before the first stage's and the head after the last one's."""

    cos: Tensor
    sin: Tensor

    def __init__(
        self, shape: Shape, sequence: int, stage: int = 0, stages: int = 1, autocast: torch.dtype | None = None
    ) -> None:
        super().__init__()
        per_stage = -(-shape.layers // stages)
        own = min(per_stage, shape.layers - stage * per_stage)
        first, last = stage == 0, stage == stages - 1
        self.embedding = nn.Embedding(shape.vocabulary, shape.dim) if first else None
        self.layers = nn.ModuleList(Layer(shape) for _ in range(own))
        self.norm = nn.RMSNorm(shape.dim) if last else None
        self.head = nn.Linear(shape.dim, shape.vocabulary, bias=False) if last else None
        cos, sin = rotation(sequence, shape.dim // shape.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.autocast = autocast
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the last stage, hidden states of another; x is tokens for the first stage, states for others."""
        with torch.autocast(x.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            if self.embedding is not None:
                x = self.embedding(x)
            for layer in self.layers:
                x = layer(x, self.cos, self.sin)
            if self.norm is not None and self.head is not None:
                x = self.head(self.norm(x))
            return x


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats a token."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
