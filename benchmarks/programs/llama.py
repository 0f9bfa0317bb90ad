"""The transformers model of the Hugging Face programs: a configuration, nothing downloaded."""

import argparse

from transformers import LlamaConfig, LlamaForCausalLM

from decoder import ROTARY_BASE


def build_llama(options: argparse.Namespace) -> LlamaForCausalLM:
    """Llama of the options' shape, its embedding and head tied as in the models of a billion parameters."""
    shape = options.shape
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.dim,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=options.sequence,
        rope_parameters={"rope_type": "default", "rope_theta": ROTARY_BASE},
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config)
