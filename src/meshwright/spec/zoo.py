"""Named architectures with their source and published size, and a job's [model] table filled from them."""

from typing import Any

import msgspec

from meshwright.spec.errors import SettingError, closest
from meshwright.spec.model import Experts, LatentAttention, ModelSpec, RopeScaling, fill_model


class NamedModel(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the zoo: the numbers, where they were published, and the published parameter count.

    published_digits: significant digits of that count, so that a test knows what rounding allows.
    """

    spec: ModelSpec
    published_parameters: float
    published_digits: int = 3
    source: str


LLAMA3 = "Llama 3 model card and params.json, Meta, April 2024; arXiv:2407.21783 table 3"
LLAMA31 = "Llama 3.1 model card and config.json, Meta, July 2024; arXiv:2407.21783 table 3"
LLAMA32 = "Llama 3.2 model card and config.json, Meta, September 2024"
QWEN3 = "config.json and model card, Qwen team, April 2025; arXiv:2505.09388 tables 1 and 2"
GPT2 = "Radford et al. 2019, table 2, and the released hparams.json; counts with the released weights' shapes"


def llama3(name: str, layers: int, d_model: int, heads: int, feed_forward: int, **more: Any) -> ModelSpec:
    """A Llama 3, 3.1 or 3.2: 8 kv heads, vocabulary 128,256."""
    numbers: dict[str, Any] = {"head_dim": 128, "max_positions": 131072} | more
    return ModelSpec(
        name=name,
        layers=layers,
        d_model=d_model,
        heads=heads,
        kv_heads=8,
        feed_forward=feed_forward,
        vocabulary=128256,
        rope_theta=500000.0,
        **numbers,
    )


def qwen3(name: str, layers: int, d_model: int, heads: int, feed_forward: int, **more: Any) -> ModelSpec:
    """A Qwen3: heads of 128, vocabulary 151,936."""
    numbers: dict[str, Any] = {"family": "qwen3", "kv_heads": 8} | more
    return ModelSpec(
        name=name,
        layers=layers,
        d_model=d_model,
        heads=heads,
        head_dim=128,
        feed_forward=feed_forward,
        vocabulary=151936,
        max_positions=40960,
        rope_theta=1e6,
        norm_epsilon=1e-6,
        **numbers,
    )


def gpt2(name: str, layers: int, d_model: int, heads: int) -> ModelSpec:
    """A GPT-2: heads of 64, a feed-forward part four times as wide as the model."""
    return ModelSpec(
        name=name,
        family="gpt2",
        layers=layers,
        d_model=d_model,
        heads=heads,
        kv_heads=heads,
        head_dim=64,
        feed_forward=4 * d_model,
        vocabulary=50257,
        max_positions=1024,
        tied_embeddings=True,
    )


def mistral(name: str, family: Any, vocabulary: int, experts: Experts | None = None) -> ModelSpec:
    """Mistral 7B, and Mixtral, which has eight of its feed-forward parts."""
    return ModelSpec(
        name=name,
        family=family,
        layers=32,
        d_model=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        feed_forward=14336,
        vocabulary=vocabulary,
        max_positions=32768,
        rope_theta=1e6,
        experts=experts,
    )


STRETCHED_8 = RopeScaling(factor=8.0)
STRETCHED_32 = RopeScaling(factor=32.0)

ZOO: dict[str, NamedModel] = {
    row.spec.name: row
    for row in (
        NamedModel(
            spec=llama3("llama3-8b", 32, 4096, 32, 14336, max_positions=8192),
            published_parameters=8.03e9,
            source=LLAMA3,
        ),
        NamedModel(
            spec=llama3("llama3-70b", 80, 8192, 64, 28672, max_positions=8192),
            published_parameters=70.6e9,
            source=LLAMA3,
        ),
        NamedModel(
            spec=llama3("llama3.1-8b", 32, 4096, 32, 14336, rope_scaling=STRETCHED_8),
            published_parameters=8.03e9,
            source=LLAMA31,
        ),
        NamedModel(
            spec=llama3("llama3.1-70b", 80, 8192, 64, 28672, rope_scaling=STRETCHED_8),
            published_parameters=70.6e9,
            source=LLAMA31,
        ),
        NamedModel(
            spec=llama3("llama3.1-405b", 126, 16384, 128, 53248, rope_scaling=STRETCHED_8),
            published_parameters=406e9,
            source=LLAMA31,
        ),
        NamedModel(
            spec=llama3(
                "llama3.2-1b", 16, 2048, 32, 8192, head_dim=64, tied_embeddings=True, rope_scaling=STRETCHED_32
            ),
            published_parameters=1.24e9,
            source=LLAMA32,
        ),
        NamedModel(
            spec=llama3("llama3.2-3b", 28, 3072, 24, 8192, tied_embeddings=True, rope_scaling=STRETCHED_32),
            published_parameters=3.21e9,
            source=LLAMA32,
        ),
        NamedModel(
            # The 2048 x 16 shape of Llama-3.2-1B with an untied head: the size our GPU measurements use.
            spec=llama3("llama-1b-untied", 16, 2048, 32, 8192, head_dim=64),
            published_parameters=1.50e9,
            source=f"{LLAMA32}, with tie_word_embeddings off (1.24e9 tied, and 0.26e9 for the head)",
        ),
        NamedModel(
            spec=qwen3("qwen3-0.6b", 28, 1024, 16, 3072, tied_embeddings=True),
            published_parameters=0.6e9,
            published_digits=1,
            source=QWEN3,
        ),
        NamedModel(
            spec=qwen3("qwen3-1.7b", 28, 2048, 16, 6144, tied_embeddings=True),
            published_parameters=1.7e9,
            published_digits=2,
            source=QWEN3,
        ),
        NamedModel(
            spec=qwen3("qwen3-8b", 36, 4096, 32, 12288),
            published_parameters=8.2e9,
            published_digits=2,
            source=QWEN3,
        ),
        NamedModel(spec=qwen3("qwen3-32b", 64, 5120, 64, 25600), published_parameters=32.8e9, source=QWEN3),
        NamedModel(
            spec=qwen3(
                "qwen3-30b-a3b",
                48,
                2048,
                32,
                6144,
                family="qwen3-moe",
                kv_heads=4,
                experts=Experts(count=128, per_token=8, feed_forward=768),
            ),
            published_parameters=30.5e9,
            source=QWEN3,
        ),
        NamedModel(
            spec=qwen3(
                "qwen3-235b-a22b",
                94,
                4096,
                64,
                12288,
                family="qwen3-moe",
                kv_heads=4,
                experts=Experts(count=128, per_token=8, feed_forward=1536),
            ),
            published_parameters=235e9,
            source=QWEN3,
        ),
        NamedModel(
            spec=gpt2("gpt2-124m", 12, 768, 12), published_parameters=124e6, source=f"{GPT2} (117M in the paper)"
        ),
        NamedModel(
            spec=gpt2("gpt2-355m", 24, 1024, 16), published_parameters=355e6, source=f"{GPT2} (345M in the paper)"
        ),
        NamedModel(
            spec=gpt2("gpt2-774m", 36, 1280, 20), published_parameters=774e6, source=f"{GPT2} (762M in the paper)"
        ),
        NamedModel(spec=gpt2("gpt2-1.5b", 48, 1600, 25), published_parameters=1558e6, published_digits=4, source=GPT2),
        NamedModel(
            spec=mistral("mistral-7b", "mistral", 32768),
            published_parameters=7.25e9,
            source="Mistral-7B-v0.3 config.json and model card, Mistral AI, May 2024; arXiv:2310.06825",
        ),
        NamedModel(
            spec=mistral("mixtral-8x7b", "mixtral", 32000, Experts(count=8, per_token=2, feed_forward=14336)),
            published_parameters=46.7e9,
            source="Mixtral-8x7B-v0.1 config.json, Mistral AI, December 2023; arXiv:2401.04088",
        ),
        NamedModel(
            spec=ModelSpec(
                name="deepseek-v3",
                family="deepseek-v3",
                layers=61,
                d_model=7168,
                heads=128,
                kv_heads=128,
                head_dim=128,
                feed_forward=18432,
                vocabulary=129280,
                max_positions=163840,
                norm_epsilon=1e-6,
                experts=Experts(
                    count=256,
                    per_token=8,
                    feed_forward=2048,
                    shared=1,
                    dense_layers=3,
                    scale=2.5,
                    groups=8,
                    groups_per_token=4,
                ),
                latent=LatentAttention(query_rank=1536, kv_rank=512, rope_head_dim=64, value_head_dim=128),
            ),
            published_parameters=671e9,
            source="arXiv:2412.19437 and config.json, DeepSeek, December 2024; without the multi-token prediction "
            "module, and without rotary scaling, which changes no size",
        ),
    )
}


def expand_model(section: dict[str, Any]) -> dict[str, Any]:
    """Fill a job's [model] table: the zoo's numbers under a `name`, then what follows from its other numbers."""
    name = section.get("name", "custom")
    if name != "custom":
        if not isinstance(name, str) or name not in ZOO:
            raise SettingError(f'model.name = "{name}"', "no such model", closest(str(name), ZOO))
        section = msgspec.to_builtins(ZOO[name].spec) | section
    return fill_model(section)
