"""A plain decoder that runs alone in one process: the reference every layout must equal.

Imports spec and torch, never torch.distributed.
"""

from meshwright.models.decoder import Block, Decoder, MixtureBlock, build_model
from meshwright.models.experts import Experts, Mixture
from meshwright.models.generate import generate
from meshwright.models.initial import initial_tensor, initialize_
from meshwright.models.loss import NOT_COUNTED, token_loss
from meshwright.models.positions import rotary_tables

__all__ = [
    "NOT_COUNTED",
    "Block",
    "Decoder",
    "Experts",
    "Mixture",
    "MixtureBlock",
    "build_model",
    "generate",
    "initial_tensor",
    "initialize_",
    "rotary_tables",
    "token_loss",
]
