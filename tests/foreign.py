"""A transformer that the package does not know: its own names, biases, learned positions, shared key heads."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.spec import SplitTable

WIDTH, HEADS, KV_HEADS, HEAD_DIM, TOKENS = 16, 4, 2, 4, 37

TABLE: SplitTable = {
    "words": "vocabulary",
    "places": "positions",
    "stack.*.before": "sequence",
    "stack.*.look": "gather",
    "stack.*.look.ask": "column",
    "stack.*.look.keep": "kv_heads",
    "stack.*.look.tell": "kv_heads",
    "stack.*.look.join": "row",
    "stack.*.between": "sequence",
    "stack.*.think": "gather",
    "stack.*.think.0": "column",
    "stack.*.think.2": "row",
    "last": "sequence",
    "guess": "logits",
}


class Look(nn.Module):
    """Attention; its input comes by name."""

    def __init__(self) -> None:
        super().__init__()
        self.ask = nn.Linear(WIDTH, HEADS * HEAD_DIM)
        self.keep = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=False)
        self.tell = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=False)
        self.join = nn.Linear(HEADS * HEAD_DIM, WIDTH)

    def forward(self, *, seen: Tensor) -> Tensor:
        parts = [part(seen).unflatten(2, (-1, HEAD_DIM)).transpose(1, 2) for part in (self.ask, self.keep, self.tell)]
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
        return self.join(mixed.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.LayerNorm(WIDTH)
        self.look = Look()
        self.between = nn.LayerNorm(WIDTH)
        self.think = nn.Sequential(nn.Linear(WIDTH, 40), nn.GELU(), nn.Linear(40, WIDTH))
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor, *, scale: float) -> Tensor:
        x = x + scale * self.look(seen=self.before(x))
        return x + self.drop(self.think(self.between(x)))


class Foreign(nn.Module):
    """Dropout of `drop` in each layer."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.words = nn.Embedding(TOKENS, WIDTH)
        self.places = nn.Embedding(64, WIDTH)
        self.stack = nn.ModuleList(Layer() for _ in range(2))
        self.last = nn.LayerNorm(WIDTH)
        # No bias: a linear layer with one gives a view, and FSDP warns of writing to it in place.
        self.guess = nn.Linear(WIDTH, TOKENS, bias=False)
        for layer in self.stack:
            layer.drop = nn.Dropout(drop)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places(self.positions(tokens))
        for layer in self.stack:
            x = layer(x, scale=0.5)
        return self.guess(self.last(x))

    def positions(self, tokens: Tensor) -> Tensor:
        return torch.arange(tokens.shape[1]).expand_as(tokens)


class Unbatched(Foreign):
    """Its positions are [S], as nanoGPT's are."""

    def positions(self, tokens: Tensor) -> Tensor:
        return torch.arange(tokens.shape[1])
