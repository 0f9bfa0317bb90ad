"""The architecture's numbers."""

from typing import Any, cast

import msgspec

from meshwright.spec.errors import SettingError
from meshwright.spec.family import (
    BUILT_FAMILIES,
    FAMILIES,
    GATED,
    SPLIT_TABLES,
    Family,
    FamilyName,
    SplitTable,
)
from meshwright.spec.numbers import LARGEST, check_range, nearest_divisor


class RopeScaling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Llama 3.1's stretching of rotary positions past the `original_positions` that a model was first trained on.

    Turns slower than `low_frequency` in the original context are slowed by `factor`, those faster than
    `high_frequency` stay, and those between are interpolated. Source: config.json of Llama 3.1 and 3.2.
    """

    factor: float
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_positions: int = 8192


class Experts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A mixture of experts in place of the feed-forward part.

    count: routed experts, of which a token uses `per_token`. feed_forward: width of each. shared: experts of that
    width that every token uses, as one. dense_layers: first layers that keep a plain feed-forward part.
    normalised: a token's weights sum to 1 before they are multiplied by `scale`. groups: experts come in so many equal
    groups, of which a token uses the `groups_per_token` best.

    balance_loss: coefficient of the loss that makes routers use experts alike within each sequence; 0: none.
    bias_rate: how far the bias that a router chooses by moves after each step, up for an expert that got less than the
    mean of the global batch and down for one that got more; 0: not at all.
    """

    count: int
    per_token: int
    feed_forward: int
    shared: int = 0
    dense_layers: int = 0
    normalised: bool = True
    scale: float = 1.0
    groups: int = 1
    groups_per_token: int = 1
    balance_loss: float = 0.0
    bias_rate: float = 0.0


class LatentAttention(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """DeepSeek's multi-head latent attention, arXiv:2405.04434: queries, and keys with values, through low ranks.

    A query or key head has head_dim numbers without positions and rope_head_dim with; a value head value_head_dim.
    """

    query_rank: int
    kv_rank: int
    rope_head_dim: int
    value_head_dim: int


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A decoder: its family (spec/family.py), which says what blocks are made of, and its numbers.

    Letters in shapes throughout the model code: B batch, S sequence, D `d_model`, H `heads`, K `kv_heads`,
    E `head_dim`, F `feed_forward`, V `vocabulary`, P `max_positions`, X experts.

    max_positions: the longest sequence the model is meant for, and the rows of a learned table; 0: not stated.
    attention_window: tokens back that a token attends to, itself among them; 0: all.
    path: a Hugging Face folder whose weights the model starts from; "": from weights drawn by the run's seed.
    """

    name: str = "custom"
    family: FamilyName = "llama"
    layers: int
    d_model: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocabulary: int
    max_positions: int = 0
    tied_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_epsilon: float = 1e-5
    attention_window: int = 0
    experts: Experts | None = None
    latent: LatentAttention | None = None
    path: str = ""

    @property
    def parts(self) -> Family:
        """What the family's blocks are made of."""
        return FAMILIES[self.family]

    @property
    def selection_bias(self) -> bool:
        """Whether routers choose by scores with a bias: DeepSeek-V3's always, others where a rate moves it."""
        return self.experts is not None and (self.parts.scores == "sigmoid" or self.experts.bias_rate > 0)

    def is_dense(self, layer: int) -> bool:
        """Whether a layer has a plain feed-forward part."""
        return self.experts is None or layer < self.experts.dense_layers


def split_table(model: ModelSpec) -> SplitTable:
    """How the model's modules are split along tensor: of its family's table, what this model has modules for."""
    table = SPLIT_TABLES[model.family]
    if model.experts is None:
        return table
    kept: SplitTable = {p: word for p, word in table.items() if model.experts.shared or ".shared" not in p}
    # Named one by one: a plain part is gathered whole, and a mixture of the same name takes its tokens as they are.
    plain: SplitTable = {
        pattern.replace("*", str(layer)): word
        for layer in range(model.experts.dense_layers)
        for pattern, word in GATED.items()
    }
    return plain | kept


def fill_model(section: dict[str, Any]) -> dict[str, Any]:
    """A [model] table with what follows from its other numbers: kv_heads, head_dim, feed_forward of a mixture."""
    filled = dict(section)
    heads, d_model = filled.get("heads"), filled.get("d_model")
    if heads is not None:
        filled.setdefault("kv_heads", heads)
    experts = filled.get("experts")
    numbers = cast(dict[str, Any], experts) if isinstance(experts, dict) else {}
    if "feed_forward" in numbers and not numbers.get("dense_layers"):
        # No layer has a plain part: what transformers writes for such a model is the experts' width.
        filled.setdefault("feed_forward", numbers["feed_forward"])
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
        check_range(f"model.{setting}", getattr(model, setting), 1, LARGEST)
    for setting in ("max_positions", "attention_window"):
        check_range(f"model.{setting}", getattr(model, setting), 0, LARGEST)
    check_range("model.rope_theta", model.rope_theta, 1.0, 1e12)
    check_range("model.norm_epsilon", model.norm_epsilon, 0.0, 1.0)
    if model.heads % model.kv_heads:
        raise SettingError(
            f"model.kv_heads = {model.kv_heads}",
            f"does not divide model.heads = {model.heads}",
            f"model.kv_heads = {nearest_divisor(model.heads, model.kv_heads)}",
        )
    if model.parts.positions == "learned":
        check_learned(model)
    else:
        check_rotary(model)
    check_mixture(model)


def check_learned(model: ModelSpec) -> None:
    """What a learned table of positions needs, and what means nothing beside it."""
    if model.max_positions == 0:
        reason = f"is missing: {model.family} learns its positions"
        raise SettingError("model.max_positions", reason, "model.max_positions = 1024")
    if model.rope_theta != 10000.0 or model.rope_scaling is not None:
        setting = "model.rope_scaling" if model.rope_scaling is not None else f"model.rope_theta = {model.rope_theta}"
        raise SettingError(setting, f"means nothing to {model.family}, which learns its positions", "leave it out")


def check_rotary(model: ModelSpec) -> None:
    """What rotary positions need."""
    if model.head_dim % 2:
        raise SettingError(
            f"model.head_dim = {model.head_dim}",
            "rotary positions need an even number",
            f"model.head_dim = {model.head_dim + 1}",
        )
    scaling = model.rope_scaling
    if scaling is None:
        return
    check_range("model.rope_scaling.factor", scaling.factor, 1.0, 1e6)
    check_range("model.rope_scaling.original_positions", scaling.original_positions, 1, LARGEST)
    check_range("model.rope_scaling.low_frequency", scaling.low_frequency, 1e-6, 1e6)
    # Written so that nan, which is above nothing, is refused too.
    if not scaling.low_frequency < scaling.high_frequency <= 1e7:
        raise SettingError(
            f"model.rope_scaling.high_frequency = {scaling.high_frequency}",
            f"must be above low_frequency = {scaling.low_frequency}, and at most 1e7",
            f"model.rope_scaling.high_frequency = {4 * scaling.low_frequency}",
        )


def check_mixture(model: ModelSpec) -> None:
    """Experts and latent attention belong to families that have them."""
    mixture = model.parts.mixture
    if (model.experts is not None) != mixture:
        reason = "is missing" if mixture else f"means nothing to {model.family}"
        nearest = "add [model.experts]" if mixture else 'model.family = "mixtral"'
        raise SettingError("model.experts", f"{reason} (family {model.family})", nearest)
    if (model.latent is not None) != (model.family == "deepseek-v3"):
        reason = "means nothing to" if model.latent is not None else "is missing for"
        raise SettingError("model.latent", f"{reason} family {model.family}", 'a model.name such as "deepseek-v3"')
    if model.experts is not None:
        check_experts(model.experts, model.layers)


def check_experts(experts: Experts, layers: int) -> None:
    """Raise SettingError where the numbers cannot be a mixture."""
    for setting, value, low, high in (
        ("count", experts.count, 1, LARGEST),
        ("per_token", experts.per_token, 1, experts.count),
        ("feed_forward", experts.feed_forward, 1, LARGEST),
        ("shared", experts.shared, 0, LARGEST),
        ("dense_layers", experts.dense_layers, 0, layers - 1),
        ("scale", experts.scale, 1e-6, 1e6),
        ("groups", experts.groups, 1, experts.count),
        ("groups_per_token", experts.groups_per_token, 1, experts.groups),
        ("balance_loss", experts.balance_loss, 0.0, 1e3),
        ("bias_rate", experts.bias_rate, 0.0, 1.0),
    ):
        check_range(f"model.experts.{setting}", value, low, high)
    if experts.count % experts.groups:
        near = nearest_divisor(experts.count, experts.groups)
        reason = f"does not divide model.experts.count = {experts.count}"
        raise SettingError(f"model.experts.groups = {experts.groups}", reason, f"model.experts.groups = {near}")
    inside = experts.count // experts.groups * experts.groups_per_token
    if experts.per_token > inside:
        reason = f"is more than the {inside} experts in model.experts.groups_per_token = {experts.groups_per_token}"
        setting = "model.experts.per_token"
        raise SettingError(f"{setting} = {experts.per_token}", reason, f"{setting} = {inside}")


def check_sequence(model: ModelSpec, sequence: int) -> None:
    """Raise SettingError for samples longer than the model's positions."""
    if 0 < model.max_positions < sequence:
        raise SettingError(
            f"data.sequence = {sequence}",
            f"the model is meant for {model.max_positions} positions",
            f"data.sequence = {model.max_positions}, or a larger model.max_positions",
        )


def check_built(model: ModelSpec) -> None:
    """Raise SettingError for a model that can be planned and not yet trained."""
    if not model.parts.built:
        families = " or ".join(BUILT_FAMILIES)
        raise SettingError(
            f'model.family = "{model.family}"', "can be planned; training it is not built yet", f"a {families} model"
        )
