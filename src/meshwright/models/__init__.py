"""A plain Llama-style decoder that runs alone in one process: the reference every layout must equal.

Imports spec and torch, never torch.distributed.
"""

from meshwright.models.decoder import Block, Decoder, build_model, rotary_tables
from meshwright.models.generate import generate
from meshwright.models.initial import initial_tensor, initialize_
from meshwright.models.loss import NOT_COUNTED, token_loss

__all__ = [
    "NOT_COUNTED",
    "Block",
    "Decoder",
    "build_model",
    "generate",
    "initial_tensor",
    "initialize_",
    "rotary_tables",
    "token_loss",
]
