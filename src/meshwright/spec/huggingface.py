"""A model's numbers as the content of a Hugging Face config.json, in and out.

Keys and the values they have where a config leaves them out are those of transformers' configuration classes, read in
4.57 and 5.23. A test holds both directions to transformers itself.
"""

from typing import Any, cast

import msgspec

from meshwright.spec.errors import SettingError, closest
from meshwright.spec.family import BUILT_FAMILIES, FamilyName
from meshwright.spec.model import ModelSpec, RopeScaling

Config = dict[str, Any]


class ConfigFormat(msgspec.Struct, frozen=True, kw_only=True):
    """How one family's numbers stand in its config.json.

    numbers, experts, latent: our name to theirs. omitted: what transformers takes for a key that a config leaves out
    or has as null; a key that is not here must be there. only: keys whose other values would be another model, with
    the values that we build, the first of which is written.
    """

    model_type: str
    architecture: str
    numbers: dict[str, str]
    experts: dict[str, str] = {}
    latent: dict[str, str] = {}
    omitted: Config = {}
    only: dict[str, tuple[Any, ...]] = {}


NUMBERS = {
    "layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "feed_forward": "intermediate_size",
    "vocabulary": "vocab_size",
    "max_positions": "max_position_embeddings",
    "tied_embeddings": "tie_word_embeddings",
    "norm_epsilon": "rms_norm_eps",
}
GPT2_NUMBERS = {
    "layers": "n_layer",
    "d_model": "n_embd",
    "heads": "n_head",
    "feed_forward": "n_inner",
    "vocabulary": "vocab_size",
    "max_positions": "n_positions",
    "tied_embeddings": "tie_word_embeddings",
    "norm_epsilon": "layer_norm_epsilon",
}
OMITTED: Config = {
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    # Not stated; transformers would take a number of its own, which limits nothing.
    "max_position_embeddings": 0,
}
ONLY: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish")}
# Noise on a router's input in training.
MIXTRAL_ONLY = ONLY | {"router_jitter_noise": (0.0,)}
QWEN3_ONLY = ONLY | {"attention_bias": (False,)}

FORMATS: dict[FamilyName, ConfigFormat] = {
    "llama": ConfigFormat(
        model_type="llama",
        architecture="LlamaForCausalLM",
        numbers=NUMBERS,
        omitted=OMITTED,
        only=ONLY | {"attention_bias": (False,), "mlp_bias": (False,)},
    ),
    "mistral": ConfigFormat(
        model_type="mistral",
        architecture="MistralForCausalLM",
        numbers=NUMBERS,
        omitted=OMITTED | {"num_key_value_heads": 8, "sliding_window": 4096},
        only=ONLY,
    ),
    "qwen3": ConfigFormat(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        numbers=NUMBERS,
        omitted=OMITTED | {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
        only=QWEN3_ONLY,
    ),
    "gpt2": ConfigFormat(
        model_type="gpt2",
        architecture="GPT2LMHeadModel",
        numbers=GPT2_NUMBERS,
        omitted={"tie_word_embeddings": True, "layer_norm_epsilon": 1e-5},
        only={
            # Two names of one function, GELU's tanh form.
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "reorder_and_upcast_attn": (False,),
            "add_cross_attention": (False,),
        },
    ),
    "mixtral": ConfigFormat(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        numbers=NUMBERS,
        experts={"count": "num_local_experts", "per_token": "num_experts_per_tok", "feed_forward": "intermediate_size"},
        omitted=OMITTED | {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None},
        only=MIXTRAL_ONLY,
    ),
    "qwen3-moe": ConfigFormat(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        numbers=NUMBERS,
        experts={
            "count": "num_experts",
            "per_token": "num_experts_per_tok",
            "feed_forward": "moe_intermediate_size",
            "normalised": "norm_topk_prob",
        },
        omitted=OMITTED
        | {"norm_topk_prob": False, "num_key_value_heads": 4, "sliding_window": 4096, "max_window_layers": 0},
        only=QWEN3_ONLY | {"decoder_sparse_step": (1,), "mlp_only_layers": ([],)},
    ),
    "deepseek-v3": ConfigFormat(
        model_type="deepseek_v3",
        architecture="DeepseekV3ForCausalLM",
        numbers=NUMBERS | {"head_dim": "qk_nope_head_dim"},
        experts={
            "count": "n_routed_experts",
            "per_token": "num_experts_per_tok",
            "feed_forward": "moe_intermediate_size",
            "shared": "n_shared_experts",
            "dense_layers": "first_k_dense_replace",
            "normalised": "norm_topk_prob",
            "scale": "routed_scaling_factor",
            "groups": "n_group",
            "groups_per_token": "topk_group",
        },
        latent={
            "query_rank": "q_lora_rank",
            "kv_rank": "kv_lora_rank",
            "rope_head_dim": "qk_rope_head_dim",
            "value_head_dim": "v_head_dim",
        },
        omitted=OMITTED
        | {"num_key_value_heads": 128, "norm_topk_prob": True}
        | {"routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4},
        only=ONLY | {"attention_bias": (False,), "moe_layer_freq": (1,)},
    ),
}
# What one version of transformers calls otherwise than the others.
ALSO = {"num_experts": "num_local_experts"}
# What follows from other numbers where it is null.
DERIVED = ("num_key_value_heads", "head_dim", "n_inner")


def model_of_config(config: Config, where: str = "config.json") -> ModelSpec:
    """The model that a config.json describes. Raises SettingError for one that we would not build as it says.

    where: what to call the file in a refusal. Of a family that is only planned, what changes no size is passed over:
    scaled positions and quantized weights.
    """
    family = family_of(config, where)
    form = FORMATS[family]
    refuse_others(config, family, where)
    numbers = {ours: number(config, theirs, form, where) for ours, theirs in form.numbers.items()}
    heads, d_model = numbers["heads"], numbers["d_model"]
    if numbers.get("kv_heads") is None:
        numbers["kv_heads"] = heads
    if numbers.get("head_dim") is None:
        # Where these are no numbers the conversion below says so.
        whole = isinstance(heads, int) and isinstance(d_model, int) and heads > 0
        if whole and d_model % heads:
            raise refusal(where, form.numbers["heads"], heads, "does not divide the model's width", "head_dim = ...")
        numbers["head_dim"] = d_model // heads if whole else 0
    if numbers["feed_forward"] is None and isinstance(d_model, int):
        numbers["feed_forward"] = 4 * d_model
    if family != "gpt2":
        numbers |= rope_of(config, family, where)
        numbers["attention_window"] = window_of(config, form, where)
    for part, names in (("experts", form.experts), ("latent", form.latent)):
        if names:
            numbers[part] = {ours: number(config, theirs, form, where) for ours, theirs in names.items()}
    try:
        return msgspec.convert({"family": family} | numbers, ModelSpec)
    except msgspec.ValidationError as error:
        reason, _, ours = str(error).lower().replace("`", "").partition(" - at $.")
        name = ours.rpartition(".")[2]
        theirs = ({"attention_window": "sliding_window"} | form.numbers | form.experts | form.latent).get(name, name)
        raise SettingError(f"{where}: {theirs}", reason, "a value of that kind") from None


def family_of(config: Config, where: str) -> FamilyName:
    """Which family a config's model_type is."""
    known: dict[str, FamilyName] = {form.model_type: family for family, form in FORMATS.items()}
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in known:
        name = "is missing" if kind is None else f'"{kind}" is none of the families here'
        raise SettingError(f"{where}: model_type", name, closest(str(kind), known))
    return known[kind]


def number(config: Config, key: str, form: ConfigFormat, where: str) -> Any:
    """What a config says for a key, or what transformers takes where it says nothing; None where that follows from
    other numbers."""
    value = config.get(key)
    # A null among these is a word of its own.
    if value is None and not (key in DERIVED and key in config):
        value = config.get(ALSO.get(key, ""), form.omitted.get(key))
    if value is None and key not in DERIVED:
        raise SettingError(f"{where}: {key}", "is missing", f"a config.json of {form.architecture}")
    return value


def whole_number(config: Config, key: str, form: ConfigFormat, where: str) -> int:
    """What `number` finds, where it is compared before the model's types are checked."""
    value = number(config, key, form, where)
    if not isinstance(value, int) or isinstance(value, bool):
        raise refusal(where, key, value, "is no whole number", "a whole number")
    return value


def refuse_others(config: Config, family: FamilyName, where: str) -> None:
    """Raise SettingError for a key whose value makes it another model than ours."""
    form = FORMATS[family]
    for key, allowed in form.only.items():
        value = config.get(key)
        if value is not None and value not in allowed:
            raise refusal(where, key, value, "is not built", f"{key} = {as_json(allowed[0])}")
    if family not in BUILT_FAMILIES:
        return
    if config.get("quantization_config") is not None:
        raise SettingError(f"{where}: quantization_config", "quantized weights are not read", "weights in bf16 or fp32")
    if (factor := config.get("partial_rotary_factor") or 1) != 1:
        raise refusal(where, "partial_rotary_factor", factor, "is not built", "partial_rotary_factor = 1")


def rope_of(config: Config, family: FamilyName, where: str) -> dict[str, Any]:
    """rope_theta and rope_scaling, from transformers 4's keys or 5's rope_parameters."""
    # In this order, as transformers 5 reads a config that has both.
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = as_section(config.get(key) or {}, f"{where}: {key}")
    theta = rope.get("rope_theta", number(config, "rope_theta", FORMATS[family], where))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if family not in BUILT_FAMILIES:
        return {"rope_theta": theta}
    if any(isinstance(value, dict) for value in rope.values()):
        raise SettingError(f"{where}: {key}", "differs from layer to layer, which is not built", "one for all layers")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise refusal(where, f"{key}.partial_rotary_factor", rope["partial_rotary_factor"], "is not built", "1")
    if kind == "default":
        return {"rope_theta": theta}
    if kind != "llama3":
        raise refusal(where, f"{key}.rope_type", kind, "is not built", 'rope_type = "llama3", or none')
    scaling: dict[str, Any] = {
        "factor": rope.get("factor"),
        "low_frequency": rope.get("low_freq_factor", 1.0),
        "high_frequency": rope.get("high_freq_factor", 4.0),
        "original_positions": rope.get(
            "original_max_position_embeddings", number(config, "max_position_embeddings", FORMATS[family], where)
        ),
    }
    return {"rope_theta": theta, "rope_scaling": scaling}


def window_of(config: Config, form: ConfigFormat, where: str) -> int:
    """Tokens back that every layer attends to; 0: all. Layers that differ in it are refused."""
    types = config.get("layer_types")
    if types is not None and not isinstance(types, list):
        raise refusal(where, "layer_types", types, "is no list", "one word for each layer")
    kinds: list[str] = sorted(set(map(str, cast(list[Any], types or []))))
    if kinds not in ([], ["full_attention"], ["sliding_attention"]):
        reason = f"are {' and '.join(kinds)}; layers that differ are not built"
        raise SettingError(f"{where}: layer_types", reason, "all layers alike")
    window = config.get("sliding_window", form.omitted.get("sliding_window")) or 0
    # Where transformers reads no window there is none, whatever the config says.
    if kinds == ["full_attention"] or "sliding_window" not in form.omitted:
        return 0
    if "max_window_layers" not in form.omitted:
        return window
    if not config.get("use_sliding_window") or not window:
        return 0
    whole = whole_number(config, "max_window_layers", form, where)
    if not kinds and 0 < whole < whole_number(config, form.numbers["layers"], form, where):
        reason = "gives only the later layers a window, which is not built"
        raise refusal(where, "max_window_layers", whole, reason, "max_window_layers = 0")
    return 0 if not kinds and whole else window


def config_of_model(model: ModelSpec) -> Config:
    """The config.json of a model, for transformers 4 and 5. Raises SettingError for what transformers cannot say.

    A model whose longest sequence is not stated gets no word about it.
    """
    form = FORMATS[model.family]
    config: Config = {"architectures": [form.architecture], "model_type": form.model_type}
    config |= {theirs: getattr(model, ours) for ours, theirs in form.numbers.items()}
    if model.max_positions == 0:
        del config[form.numbers["max_positions"]]
    for part, names in ((model.experts, form.experts), (model.latent, form.latent)):
        config |= {theirs: getattr(part, ours) for ours, theirs in names.items()}
    config |= {key: allowed[0] for key, allowed in form.only.items()}
    config |= {new: config[old] for old, new in ALSO.items() if old in config}
    if model.family == "gpt2":
        # Trained without dropout; transformers' own default is 0.1.
        config |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    else:
        config |= rope_config(model.rope_theta, model.rope_scaling) | window_config(model)
    if model.selection_bias and model.parts.scores == "softmax":
        reason = f"{form.architecture} of transformers has no bias to choose experts by; this one was trained with one"
        raise SettingError("model.experts.bias_rate", reason, "a model trained without it")
    if model.experts is not None:
        # How a model was balanced in training is no part of what it is.
        experts = msgspec.structs.replace(model.experts, balance_loss=0.0, bias_rate=0.0)
        model = msgspec.structs.replace(model, experts=experts)
    said, meant = (msgspec.to_builtins(m) for m in (model_of_config(config), model))
    for setting in said.keys() - {"name", "path"}:
        if said[setting] != meant[setting]:
            raise SettingError(
                f"model.{setting} = {as_json(meant[setting])}",
                f"{form.architecture} of transformers has no word for it",
                f"model.{setting} = {as_json(said[setting])}",
            )
    return config


def rope_config(theta: float, scaling: RopeScaling | None) -> Config:
    """Rotary positions in transformers 4's words and in 5's."""
    rope: Config = {"rope_type": "default"}
    if scaling is not None:
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency,
            "high_freq_factor": scaling.high_frequency,
            "original_max_position_embeddings": scaling.original_positions,
        }
    stretched = None if scaling is None else rope
    return {"rope_theta": theta, "rope_scaling": stretched, "rope_parameters": rope | {"rope_theta": theta}}


def window_config(model: ModelSpec) -> Config:
    """The attention window in the family's words."""
    window = model.attention_window or None
    if model.family in ("mistral", "mixtral"):
        return {"sliding_window": window}
    if model.family in ("qwen3", "qwen3-moe"):
        kind = "sliding_attention" if window else "full_attention"
        whole = 0 if window else model.layers
        windows: Config = {"use_sliding_window": bool(window), "sliding_window": window, "max_window_layers": whole}
        return windows | {"layer_types": [kind] * model.layers}
    return {}


def refusal(where: str, key: str, value: Any, reason: str, nearest: str) -> SettingError:
    """What is wrong with a key of a config."""
    return SettingError(f"{where}: {key} = {as_json(value)}", reason, nearest)


def as_section(value: Any, where: str) -> Config:
    """A value that must be an object."""
    if not isinstance(value, dict):
        raise SettingError(where, "is no object of keys and values", "{...}")
    return cast(Config, value)


def as_json(value: Any) -> str:
    """A value as it stands in a config."""
    return msgspec.json.encode(value).decode()
