"""Text from a trained model, the simple way: no cache, the whole window again for each token."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def generate(
    model: nn.Module, tokens: Tensor, count: int, temperature: float = 0.8, seed: int = 0, window: int | None = None
) -> Tensor:
    """Continue each row of tokens [B, S] by `count` tokens; returns [B, S + count].

    window: how many of the last tokens the model sees; pass the length it was trained on. temperature 0 takes the
    likeliest token. The same arguments give the same tokens.
    """
    generator = torch.Generator(tokens.device).manual_seed(seed)
    for _ in range(count):
        seen = tokens if window is None else tokens[:, -window:]
        logits = model(seen)[:, -1].float()  # [B, V]
        if temperature == 0:
            chosen = logits.argmax(-1, keepdim=True)
        else:
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        tokens = torch.cat((tokens, chosen), dim=1)
    return tokens
