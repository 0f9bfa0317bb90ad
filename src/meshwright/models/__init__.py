"""A plain decoder that runs alone in one process: the reference every layout must equal.

Imports spec and torch, never torch.distributed.
"""

from meshwright.models.attention import Attend, Mask, attend, build_mask
from meshwright.models.decoder import Attention, Block, Decoder, Head, MixtureBlock, build_model
from meshwright.models.experts import Experts, Mixture
from meshwright.models.generate import generate
from meshwright.models.initial import initial_tensor, initialize_
from meshwright.models.loss import NOT_COUNTED, token_loss
from meshwright.models.positions import rotary_tables
from meshwright.models.view import View, build_view, place_tokens

__all__ = [
    "NOT_COUNTED",
    "Attend",
    "Attention",
    "Block",
    "Decoder",
    "Experts",
    "Head",
    "Mask",
    "Mixture",
    "MixtureBlock",
    "View",
    "attend",
    "build_mask",
    "build_model",
    "build_view",
    "generate",
    "initial_tensor",
    "initialize_",
    "place_tokens",
    "rotary_tables",
    "token_loss",
]
