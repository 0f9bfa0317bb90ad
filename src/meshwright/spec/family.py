"""What the blocks of a family of models are made of, and how a family's modules are split along the tensor axis."""

from fnmatch import fnmatchcase
from typing import Literal, get_args

import msgspec

FamilyName = Literal["llama", "mistral", "qwen3", "gpt2", "gpt2-moe", "mixtral", "qwen3-moe", "deepseek-v3"]


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """What tells one family's decoder from another's; everything else is numbers (ModelSpec).

    norm: RMSNorm, or LayerNorm. positions: rotary, or a learned table. gated: SwiGLU in the feed-forward part, or
    else GELU (its tanh form) between two matrices. biases: in every linear layer but the head. head_norms: an
    RMSNorm over each query and key head. mixture: experts in place of feed-forward parts. scores: what their router
    makes of its outputs. built: whether `models` has it; the others can be counted and planned.
    """

    norm: Literal["rms", "layer"] = "rms"
    positions: Literal["rotary", "learned"] = "rotary"
    gated: bool = True
    biases: bool = False
    head_norms: bool = False
    mixture: bool = False
    scores: Literal["softmax", "sigmoid"] = "softmax"
    built: bool = True


FAMILIES: dict[FamilyName, Family] = {
    # Llama 2 and 3 (arXiv:2407.21783), and Mistral (arXiv:2310.06825), which differs by its attention window alone.
    "llama": Family(),
    "mistral": Family(),
    # Qwen3, arXiv:2505.09388.
    "qwen3": Family(head_norms=True),
    # GPT-2, Radford et al. 2019.
    "gpt2": Family(norm="layer", positions="learned", gated=False, biases=True),
    # The same with experts, as Megatron-Core builds it.
    "gpt2-moe": Family(norm="layer", positions="learned", gated=False, biases=True, mixture=True, built=False),
    # Mixtral, arXiv:2401.04088; DeepSeek-V3, arXiv:2412.19437.
    "mixtral": Family(mixture=True),
    "qwen3-moe": Family(head_norms=True, mixture=True),
    "deepseek-v3": Family(mixture=True, scores="sigmoid", built=False),
}
BUILT_FAMILIES: tuple[FamilyName, ...] = tuple(name for name in get_args(FamilyName) if FAMILIES[name].built)

# How a module is split along the tensor axis. Between modules that name no other, activations are split along the
# sequence; `parallel/tensor.py` maps each word to what torch does.
#   vocabulary  an embedding: each rank has some tokens' rows, and outputs are summed and split along the sequence
#   positions   a table of positions: whole on each rank, which looks up its part of the sequence
#   sequence    whole on each rank, applied to its part of the sequence: norms
#   gather      not split itself: its first input is gathered along the sequence, once for all modules inside
#   column      each rank has some outputs
#   kv_heads    column by whole key or value heads; where there are fewer heads than ranks, ranks share them
#   heads       whole on each rank, applied to its heads
#   row         each rank has some inputs; outputs are summed and split along the sequence
#   logits      column whose input is gathered along the sequence and whose outputs, logits, stay split
#   router      whole on each rank, applied to its part of the sequence: a mixture's router
#   experts     not split: each rank sends its part of the sequence to the experts, which the expert axis divides
Split = Literal[
    "vocabulary",
    "positions",
    "sequence",
    "gather",
    "column",
    "kv_heads",
    "heads",
    "row",
    "logits",
    "router",
    "experts",
]
# Module pattern (a * stands for one or more parts of a name) to word.
SplitTable = dict[str, Split]

ATTENTION: SplitTable = {
    "blocks.*.attention_norm": "sequence",
    "blocks.*.attention": "gather",
    "blocks.*.attention.query": "column",
    "blocks.*.attention.key": "kv_heads",
    "blocks.*.attention.value": "kv_heads",
    "blocks.*.attention.output": "row",
}
HEAD_NORMS: SplitTable = {
    "blocks.*.attention.query_norm": "heads",
    "blocks.*.attention.key_norm": "heads",
}
GATED: SplitTable = {
    "blocks.*.feed_forward_norm": "sequence",
    "blocks.*.feed_forward": "gather",
    "blocks.*.feed_forward.gate": "column",
    "blocks.*.feed_forward.up": "column",
    "blocks.*.feed_forward.down": "row",
}
PLAIN: SplitTable = {name: word for name, word in GATED.items() if not name.endswith(".gate")}
ENDS: SplitTable = {"embedding": "vocabulary", "norm": "sequence", "head": "logits"}
LEARNED: SplitTable = {"positions": "positions"}

EXPERTS: SplitTable = {
    "blocks.*.feed_forward_norm": "sequence",
    "blocks.*.feed_forward.router": "router",
    "blocks.*.feed_forward.experts": "experts",
    "blocks.*.feed_forward.shared": "gather",
    "blocks.*.feed_forward.shared.gate": "column",
    "blocks.*.feed_forward.shared.up": "column",
    "blocks.*.feed_forward.shared.down": "row",
}
PLAIN_EXPERTS: SplitTable = {name: word for name, word in EXPERTS.items() if not name.endswith(".gate")}
# What only planning knows so far.
LATENT: SplitTable = {
    "blocks.*.attention.query_down": "sequence",
    "blocks.*.attention.query_norm": "sequence",
    "blocks.*.attention.kv_down": "sequence",
    "blocks.*.attention.kv_norm": "sequence",
}

SPLIT_TABLES: dict[FamilyName, SplitTable] = {
    "llama": ENDS | ATTENTION | GATED,
    "mistral": ENDS | ATTENTION | GATED,
    "qwen3": ENDS | ATTENTION | HEAD_NORMS | GATED,
    "gpt2": ENDS | LEARNED | ATTENTION | PLAIN,
    "gpt2-moe": ENDS | LEARNED | ATTENTION | PLAIN_EXPERTS,
    "mixtral": ENDS | ATTENTION | EXPERTS,
    "qwen3-moe": ENDS | ATTENTION | HEAD_NORMS | EXPERTS,
    "deepseek-v3": ENDS | ATTENTION | LATENT | EXPERTS,
}


def split_of(table: SplitTable, module: str) -> Split | None:
    """The word for a module's name; None where no pattern matches."""
    return next((word for pattern, word in table.items() if fnmatchcase(module, pattern)), None)
