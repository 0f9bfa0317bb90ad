"""Where each of our parameters lies in a Hugging Face checkpoint of its family, as data for both directions."""

import msgspec

from meshwright.spec.count import Shapes, parameter_shapes
from meshwright.spec.family import FamilyName
from meshwright.spec.model import ModelSpec, check_built


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """One of our parameters, or one expert's part of it, as rows of one of their tensors.

    expert: which one's; None: the whole parameter. shape: of that, ours. transposed: theirs is [inputs, outputs], where
    ours is [outputs, inputs]. first: which row of theirs, laid our way round, is our first.
    """

    ours: str
    theirs: str
    shape: tuple[int, ...]
    transposed: bool = False
    first: int = 0
    expert: int | None = None


class Names(msgspec.Struct, frozen=True, kw_only=True):
    """A family's tensor names: our module to theirs.

    base: what stands before every name but the head's, unless the model was saved without its head. layers: before a
    block's number. Modules of ours with one name of theirs are its rows, in our order. experts: our stacks to their
    matrices, {} standing for an expert's number. transposed: their modules with [inputs, outputs] weights. ignored:
    tensors of old files that are no parameters.
    """

    base: str
    layers: str
    ends: dict[str, str]
    block: dict[str, str]
    experts: dict[str, str] = {}
    transposed: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


HEAD = "lm_head"

LLAMA_NAMES = Names(
    base="model.",
    layers="layers",
    ends={"embedding": "embed_tokens", "norm": "norm", "head": HEAD},
    block={
        "attention_norm": "input_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.query_norm": "self_attn.q_norm",
        "attention.key_norm": "self_attn.k_norm",
        "attention.output": "self_attn.o_proj",
        "feed_forward_norm": "post_attention_layernorm",
        "feed_forward.gate": "mlp.gate_proj",
        "feed_forward.up": "mlp.up_proj",
        "feed_forward.down": "mlp.down_proj",
    },
    # Rotary frequencies, which transformers saved before 4.32.
    ignored=("*.rotary_emb.inv_freq",),
)
GPT2_NAMES = Names(
    base="transformer.",
    layers="h",
    ends={"embedding": "wte", "positions": "wpe", "norm": "ln_f", "head": HEAD},
    block={
        "attention_norm": "ln_1",
        "attention.query": "attn.c_attn",
        "attention.key": "attn.c_attn",
        "attention.value": "attn.c_attn",
        "attention.output": "attn.c_proj",
        "feed_forward_norm": "ln_2",
        "feed_forward.up": "mlp.c_fc",
        "feed_forward.down": "mlp.c_proj",
    },
    transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    # The causal mask and its filler.
    ignored=("*.attn.bias", "*.attn.masked_bias"),
)
# What a mixture has in place of the feed-forward part's matrices.
DENSE_PART = ("feed_forward.gate", "feed_forward.up", "feed_forward.down")
SPARSE_BLOCK = {ours: theirs for ours, theirs in LLAMA_NAMES.block.items() if ours not in DENSE_PART}
MIXTRAL_NAMES = msgspec.structs.replace(
    LLAMA_NAMES,
    block=SPARSE_BLOCK | {"feed_forward.router": "block_sparse_moe.gate"},
    experts={
        "feed_forward.experts.gate": "block_sparse_moe.experts.{}.w1",
        "feed_forward.experts.up": "block_sparse_moe.experts.{}.w3",
        "feed_forward.experts.down": "block_sparse_moe.experts.{}.w2",
    },
)
QWEN3_MOE_NAMES = msgspec.structs.replace(
    LLAMA_NAMES,
    block=SPARSE_BLOCK | {"feed_forward.router": "mlp.gate"},
    experts={
        "feed_forward.experts.gate": "mlp.experts.{}.gate_proj",
        "feed_forward.experts.up": "mlp.experts.{}.up_proj",
        "feed_forward.experts.down": "mlp.experts.{}.down_proj",
    },
)
TENSOR_NAMES: dict[FamilyName, Names] = {
    "llama": LLAMA_NAMES,
    "mistral": LLAMA_NAMES,
    "qwen3": LLAMA_NAMES,
    "gpt2": GPT2_NAMES,
    "mixtral": MIXTRAL_NAMES,
    "qwen3-moe": QWEN3_MOE_NAMES,
}


def pieces_of(model: ModelSpec) -> list[Piece]:
    """Every parameter's piece, in the order of the built model. Raises SettingError for a family that is not built."""
    check_built(model)
    names = TENSOR_NAMES[model.family]
    pieces: list[Piece] = []
    filled: dict[str, int] = {}
    for ours, shape in parameter_shapes(model).items():
        module, _, kind = ours.rpartition(".")
        if module.startswith("blocks."):
            _, layer, part = module.split(".", 2)
            if stack := names.experts.get(f"{part}.{kind}"):
                pieces += stacked_pieces(ours, shape, f"{names.base}{names.layers}.{layer}.{stack}.weight")
                continue
            theirs = f"{names.base}{names.layers}.{layer}.{names.block[part]}.{kind}"
            transposed = len(shape) == 2 and names.block[part] in names.transposed
        else:
            base = "" if names.ends[module] == HEAD else names.base
            theirs, transposed = f"{base}{names.ends[module]}.{kind}", False
        first = filled.get(theirs, 0)
        filled[theirs] = first + shape[0]
        pieces.append(Piece(ours=ours, theirs=theirs, shape=shape, transposed=transposed, first=first))
    return pieces


def stacked_pieces(ours: str, shape: tuple[int, ...], theirs: str) -> list[Piece]:
    """A stack of experts' matrices, which are a tensor each of theirs."""
    numbers = range(shape[0])
    return [Piece(ours=ours, theirs=theirs.format(number), shape=shape[1:], expert=number) for number in numbers]


def their_shapes(pieces: list[Piece]) -> Shapes:
    """Name and shape of each of their tensors, in the pieces' order."""
    rows: dict[str, int] = {}
    for piece in pieces:
        rows[piece.theirs] = piece.first + piece.shape[0]
    shapes: Shapes = {}
    for piece in pieces:
        shape = (rows[piece.theirs], *piece.shape[1:])
        shapes[piece.theirs] = shape[::-1] if piece.transposed else shape
    return shapes
