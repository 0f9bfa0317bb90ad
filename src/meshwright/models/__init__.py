"""A plain decoder that runs alone in one process: the reference every layout must equal.

Imports spec and torch, never torch.distributed.
"""

from meshwright.models.decoder import Block, Decoder, Head, build_model
from meshwright.models.generate import generate
from meshwright.models.initial import initial_tensor, initialize_
from meshwright.models.loss import NOT_COUNTED, token_loss
from meshwright.models.positions import rotary_tables
from meshwright.models.view import View, build_view

__all__ = [
    "NOT_COUNTED",
    "Block",
    "Decoder",
    "Head",
    "View",
    "build_model",
    "build_view",
    "generate",
    "initial_tensor",
    "initialize_",
    "rotary_tables",
    "token_loss",
]
