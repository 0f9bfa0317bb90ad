"""Random models of transformers, saved as folders. Importing transformers is slow: only calling these does."""

from pathlib import Path
from typing import Any

import torch

# What all of them have in common: sizes that neither 2 nor 4 ranks always divide.
SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 66,
    "vocab_size": 271,
    "max_position_embeddings": 64,
}
STRETCHED = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
PLAIN = {"rope_type": "default", "rope_theta": 1e6}
GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 6, "vocab_size": 271, "n_positions": 64}

# Widths of 16 bytes' multiples, which the grouped products of transformers want.
MIXTRAL = {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 68}
MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "norm_topk_prob": False}

# Name to transformers' model class and what its configuration is given.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", SMALL),
    "llama, stretched and tied": (
        "LlamaForCausalLM",
        SMALL | {"rope_parameters": STRETCHED, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    ),
    "mistral": ("MistralForCausalLM", SMALL | {"sliding_window": 8, "rope_parameters": PLAIN}),
    "mistral, no window": ("MistralForCausalLM", SMALL | {"sliding_window": None}),
    "qwen3": ("Qwen3ForCausalLM", SMALL | {"rope_parameters": PLAIN}),
    "qwen3, windowed and tied": (
        "Qwen3ForCausalLM",
        SMALL | {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    ),
    "mixtral": ("MixtralForCausalLM", SMALL | MIXTRAL),
    "mixtral, windowed": ("MixtralForCausalLM", SMALL | MIXTRAL | {"sliding_window": 8, "rope_parameters": PLAIN}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", SMALL | MOE | {"norm_topk_prob": True}),
    "qwen3-moe, not normalised": ("Qwen3MoeForCausalLM", SMALL | MOE | {"rope_parameters": PLAIN}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2, narrow and untied": ("GPT2LMHeadModel", GPT2 | {"n_inner": 66, "tie_word_embeddings": False}),
}


def random_model(name: str, seed: int = 0) -> Any:
    """A model with random weights, norms and biases among them, so that none of them could be left out unseen."""
    import transformers

    kind = getattr(transformers, MODELS[name][0])
    model = kind(kind.config_class(**MODELS[name][1], attn_implementation="eager")).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model


def save_random(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, files: str = "5GB") -> Any:
    """Save a random model to a folder as transformers does, and return it."""
    model = random_model(name).to(dtype)
    model.save_pretrained(folder, max_shard_size=files)
    return model


def open_saved(folder: Path) -> Any:
    """The model of a folder, as transformers loads it; fails where it would make up or leave out a tensor."""
    import transformers

    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    model, told = loaded
    assert not any(told.values()), told
    return model.eval()
