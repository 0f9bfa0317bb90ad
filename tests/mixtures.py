"""Small mixtures of experts, as jobs and as models."""

from math import prod
from pathlib import Path
from typing import Any

import torch
from jobs import tiny_job

from meshwright.models import Decoder, build_model, initialize_
from meshwright.parallel.expert import mixtures_of
from meshwright.spec import AXES, Experts, Job, ModelSpec

BALANCED = {"balance_loss": 0.3, "bias_rate": 0.003}
# Name to family, and what its experts have besides.
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", BALANCED),
    # Of a width that no size of an axis divides, so that matrices are split along the other.
    "qwen3-moe": ("qwen3-moe", {"per_token": 3, "normalised": False, "balance_loss": 0.3, "feed_forward": 21}),
    # As DeepSeek-V3 has them, beside other attention.
    "shared": (
        "mixtral",
        BALANCED | {"shared": 2, "dense_layers": 1, "groups": 4, "groups_per_token": 2, "scale": 1.5},
    ),
}
# By name and layers, one that keeps the margin.
SEEDS = {
    ("mixtral", 2): 48,
    ("mixtral", 4): 31,
    ("qwen3-moe", 2): 48,
    ("qwen3-moe", 4): 2,
    ("shared", 2): 2,
    ("shared", 4): 51,
}


def mixture_job(folder: Path, mixture: str, *, accumulation: int = 1, **sections: dict[str, Any]) -> Job:
    """A job on the smallest mixture and batch that the layouts here divide."""
    family, experts = MIXTURES[mixture]
    layers = sections.get("model", {}).get("layers", 2)
    layout = sections.pop("layout", {})
    data_size = layout.get("replica", 1) * layout.get("shard", 1)
    table: dict[str, dict[str, Any]] = {
        "run": {"folder": str(folder / "runs"), "seed": SEEDS[mixture, layers]},
        "model": {
            "family": family,
            "d_model": 32,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 8,
            "feed_forward": 36,
            "vocabulary": 263,
            "experts": {"count": 8, "per_token": 2, "feed_forward": 24} | experts,
        },
        "data": {"sequence": 16, "global_batch": 8},
        "layout": layout | {"microbatch": 8 // (data_size * accumulation)},
    }
    for name, section in sections.items():
        table[name] = table.get(name, {}) | section
    ranks = prod(layout.get(axis, 1) for axis in AXES)
    return tiny_job(folder, processes=ranks, **table)


def built(**experts: Any) -> tuple[ModelSpec, Decoder]:
    """A mixture of one layer in double precision, its routers far from even."""
    numbers = Experts(count=6, per_token=2, feed_forward=10, **experts)
    spec = ModelSpec(
        family="mixtral",
        layers=1,
        d_model=12,
        heads=2,
        kv_heads=2,
        head_dim=6,
        feed_forward=8,
        vocabulary=31,
        experts=numbers,
    )
    model = build_model(spec, "cpu").double()
    initialize_(model, spec, 3)
    with torch.no_grad():
        for mixture in mixtures_of(model):
            mixture.router.weight.mul_(20)
    return spec, model
