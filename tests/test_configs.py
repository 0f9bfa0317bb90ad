"""A config.json, in and out: published ones, and those that would be another model."""

from typing import Any

import msgspec
import pytest
from test_pretrained import GPT2, LLAMA

from meshwright.spec import ZOO, ModelSpec, RopeScaling, SettingError
from meshwright.spec.huggingface import config_of_model, model_of_config

# As they were published, less what says nothing of the model's numbers.
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    },
    "qwen3-0.6b": {
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "gpt2-124m": {
        "activation_function": "gelu_new",
        "attn_pdrop": 0.1,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "vocab_size": 50257,
    },
    "mistral-7b": {
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 32768,
    },
    "mixtral-8x7b": {
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mixtral",
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "qwen3-30b-a3b": {
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "deepseek-v3": {
        "attention_bias": False,
        "first_k_dense_replace": 3,
        "hidden_act": "silu",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "model_type": "deepseek_v3",
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "quantization_config": {"quant_method": "fp8"},
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
        "rope_theta": 10000,
        "tie_word_embeddings": False,
        "v_head_dim": 128,
        "vocab_size": 129280,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_the_zoos(name: str) -> None:
    assert model_of_config(PUBLISHED[name]) == msgspec.structs.replace(ZOO[name].spec, name="custom")


def test_rotary_positions_in_the_words_of_transformers_5() -> None:
    old = PUBLISHED["llama3.1-8b"]
    new = {key: value for key, value in old.items() if key not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = old["rope_scaling"] | {"rope_theta": old["rope_theta"]}
    assert model_of_config(new) == model_of_config(old)
    assert model_of_config(new).rope_scaling == RopeScaling(factor=8.0)


LLAMA_CONFIG, QWEN3_CONFIG, GPT2_CONFIG = (PUBLISHED[name] for name in ("llama3.1-8b", "qwen3-0.6b", "gpt2-124m"))
WINDOWED_CONFIG = QWEN3_CONFIG | {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 5}


def test_a_window_from_a_layer_on_that_is_not_said_is_transformers_own() -> None:
    """From layer 28 on, of 28: none."""
    assert model_of_config(WINDOWED_CONFIG | {"max_window_layers": None}).attention_window == 0


@pytest.mark.parametrize(
    ("config", "changes", "key"),
    [
        (LLAMA_CONFIG, {"model_type": "gemma2"}, 'model_type: "gemma2" is none'),
        (LLAMA_CONFIG, {"model_type": None}, "model_type: is missing"),
        (LLAMA_CONFIG, {"hidden_act": "gelu"}, 'hidden_act = "gelu": is not built'),
        (LLAMA_CONFIG, {"attention_bias": True}, "attention_bias = true: is not built"),
        (LLAMA_CONFIG, {"mlp_bias": True}, "mlp_bias = true: is not built"),
        (LLAMA_CONFIG, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 'rope_scaling.rope_type = "dynamic"'),
        (LLAMA_CONFIG, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, 'rope_scaling.rope_type = "yarn"'),
        (
            LLAMA_CONFIG | {"rope_scaling": None},
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters: differs from layer to layer",
        ),
        (LLAMA_CONFIG, {"rope_scaling": 8}, "rope_scaling: is no object"),
        (LLAMA_CONFIG, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: is not built"),
        (LLAMA_CONFIG, {"quantization_config": {}}, "quantization_config: quantized weights"),
        (LLAMA_CONFIG, {"hidden_size": None}, "hidden_size: is missing"),
        (LLAMA_CONFIG, {"hidden_size": "4096"}, "hidden_size: expected int, got str"),
        (LLAMA_CONFIG, {"num_attention_heads": 33}, "num_attention_heads = 33: does not divide"),
        (QWEN3_CONFIG, {"attention_bias": True}, "attention_bias = true"),
        (
            QWEN3_CONFIG,
            {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 14},
            "max_window_layers = 14: gives only the later layers a window",
        ),
        (
            QWEN3_CONFIG,
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types: are full_attention and sliding_attention",
        ),
        (QWEN3_CONFIG, {"layer_types": True}, "layer_types = true: is no list"),
        (LLAMA_CONFIG, {"layer_types": 1.5}, "layer_types = 1.5: is no list"),
        (WINDOWED_CONFIG, {"max_window_layers": "x"}, 'max_window_layers = "x": is no whole number'),
        (WINDOWED_CONFIG, {"num_hidden_layers": "28"}, 'num_hidden_layers = "28": is no whole number'),
        (WINDOWED_CONFIG | {"max_window_layers": 0}, {"sliding_window": "x"}, "sliding_window: expected int"),
        (GPT2_CONFIG, {"activation_function": "gelu"}, 'activation_function = "gelu"'),
        (GPT2_CONFIG, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = true"),
        (GPT2_CONFIG, {"scale_attn_weights": False}, "scale_attn_weights = false"),
        (GPT2_CONFIG, {"n_positions": None}, "n_positions: is missing"),
        (PUBLISHED["qwen3-30b-a3b"], {"mlp_only_layers": [3]}, "mlp_only_layers = [3]"),
        (PUBLISHED["deepseek-v3"], {"q_lora_rank": None}, "q_lora_rank: is missing"),
    ],
)
def test_a_config_that_would_be_another_model_is_refused(
    config: dict[str, Any], changes: dict[str, Any], key: str
) -> None:
    with pytest.raises(SettingError) as refused:
        model_of_config(config | changes, "folder/config.json")
    assert str(refused.value).startswith("folder/config.json") and key in str(refused.value)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (msgspec.structs.replace(LLAMA, attention_window=8), "model.attention_window = 8"),
        (msgspec.structs.replace(GPT2, kv_heads=1), "model.kv_heads = 1"),
        (msgspec.structs.replace(GPT2, head_dim=4), "model.head_dim = 4"),
    ],
)
def test_a_model_that_transformers_cannot_say_is_refused(model: ModelSpec, says: str) -> None:
    with pytest.raises(SettingError, match="has no word for it") as refused:
        config_of_model(model)
    assert refused.value.setting == says
