"""The architecture's numbers, and named architectures with their source."""

import msgspec

from meshwright.spec.errors import SettingError, closest
from meshwright.spec.numbers import LARGEST, check_range, nearest_divisor


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A Llama-style decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    Letters in shapes throughout the model code: B batch, S sequence, D `d_model`, H `heads`, K `kv_heads`,
    E `head_dim`, F `feed_forward`, V `vocabulary`.
    """

    name: str = "custom"
    layers: int
    d_model: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocabulary: int
    tied_embeddings: bool = False
    rope_theta: float = 10000.0
    norm_epsilon: float = 1e-5


class NamedModel(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the zoo: the numbers, where they were published, and the published parameter count."""

    spec: ModelSpec
    published_parameters: float
    source: str


ZOO: dict[str, NamedModel] = {
    row.spec.name: row
    for row in (
        NamedModel(
            spec=ModelSpec(
                name="llama3-8b",
                layers=32,
                d_model=4096,
                heads=32,
                kv_heads=8,
                head_dim=128,
                feed_forward=14336,
                vocabulary=128256,
                rope_theta=500000.0,
            ),
            published_parameters=8.03e9,
            source="Llama 3 model card and params.json, Meta, April 2024; arXiv:2407.21783 table 3",
        ),
        NamedModel(
            spec=ModelSpec(
                name="llama3-70b",
                layers=80,
                d_model=8192,
                heads=64,
                kv_heads=8,
                head_dim=128,
                feed_forward=28672,
                vocabulary=128256,
                rope_theta=500000.0,
            ),
            published_parameters=70.6e9,
            source="Llama 3 model card and params.json, Meta, April 2024; arXiv:2407.21783 table 3",
        ),
        NamedModel(
            # The 2048 x 16 shape of Llama-3.2-1B with an untied head: the size our GPU measurements use.
            spec=ModelSpec(
                name="llama-1b-untied",
                layers=16,
                d_model=2048,
                heads=32,
                kv_heads=8,
                head_dim=64,
                feed_forward=8192,
                vocabulary=128256,
                rope_theta=500000.0,
            ),
            published_parameters=1.50e9,
            source="Llama 3.2 model card and config.json, Meta, September 2024, with tie_word_embeddings off "
            "(1.24e9 tied, and 0.26e9 for the head)",
        ),
    )
}


def expand_model(section: dict[str, object]) -> dict[str, object]:
    """Fill a job's [model] table: the zoo's numbers under a `name`, then the family's defaults."""
    name = section.get("name", "custom")
    if name != "custom":
        if not isinstance(name, str) or name not in ZOO:
            raise SettingError(f'model.name = "{name}"', "no such model", closest(str(name), ZOO))
        section = msgspec.to_builtins(ZOO[name].spec) | section
    filled = dict(section)
    heads, d_model = filled.get("heads"), filled.get("d_model")
    if heads is not None:
        filled.setdefault("kv_heads", heads)
    if "head_dim" not in filled and isinstance(heads, int) and isinstance(d_model, int) and heads > 0:
        # check_model refuses what is no size at all.
        if 1 <= d_model <= LARGEST and d_model % heads:
            raise SettingError(
                f"model.heads = {heads}",
                f"does not divide model.d_model = {d_model}, and model.head_dim is not given",
                f"model.heads = {nearest_divisor(d_model, heads)}, or set model.head_dim",
            )
        filled["head_dim"] = d_model // heads
    return filled


def check_model(model: ModelSpec) -> None:
    """Raise SettingError where the numbers cannot be a model."""
    for setting in ("layers", "d_model", "heads", "kv_heads", "head_dim", "feed_forward", "vocabulary"):
        value = getattr(model, setting)
        check_range(f"model.{setting}", value, 1, LARGEST)
    check_range("model.rope_theta", model.rope_theta, 1.0, 1e12)
    check_range("model.norm_epsilon", model.norm_epsilon, 0.0, 1.0)
    if model.heads % model.kv_heads:
        raise SettingError(
            f"model.kv_heads = {model.kv_heads}",
            f"does not divide model.heads = {model.heads}",
            f"model.kv_heads = {nearest_divisor(model.heads, model.kv_heads)}",
        )
    if model.head_dim % 2:
        raise SettingError(
            f"model.head_dim = {model.head_dim}",
            "rotary positions need an even number",
            f"model.head_dim = {model.head_dim + 1}",
        )
