"""Every layout equals one process: loss and gradient norm of five steps, each gradient of the first, SGD's weights."""

import math
from itertools import product
from pathlib import Path

import pytest
import torch
from jobs import tiny_job
from training import Tensors, train_alone, train_layout

from meshwright.spec import Job

BOUND = 1e-5


def layouts() -> list[dict[str, int]]:
    """replica, shard with each zero, and both, on 1, 2 and 4 processes, in one microbatch and in several."""
    found: list[dict[str, int]] = []
    for replica, shard, zero, microbatch in product((1, 2, 4), (1, 2, 4), (1, 2, 3), (1, 8)):
        per_rank = 8 // (replica * shard)
        if replica * shard > 4 or (shard == 1 and zero != 3):
            continue
        found.append({"replica": replica, "shard": shard, "zero": zero, "microbatch": min(microbatch, per_rank)})
    return found


def relative(one: torch.Tensor, two: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return (torch.linalg.vector_norm(one - two) / torch.linalg.vector_norm(two).clamp(min=1e-30)).item()


def largest_difference(ours: list[float | None], theirs: list[float]) -> float:
    """Relative; a number that is not finite differs by infinity."""
    pairs = zip(ours, theirs, strict=True)
    return max(abs(a - b) / b if a is not None else math.inf for a, b in pairs)


def compare(job: Job) -> dict[str, float]:
    """The largest relative differences between a layout and one process."""
    losses, norms, gradients, weights = train_alone(job)
    metrics, layout_gradients, layout_weights = train_layout(job)
    assert len(metrics) == len(losses)

    def worst(ours: Tensors, theirs: Tensors) -> float:
        assert ours.keys() == theirs.keys()
        return max(relative(ours[name], theirs[name]) for name in theirs)

    return {
        "loss": largest_difference([m.loss for m in metrics], losses),
        "norm": largest_difference([m.gradient_norm for m in metrics], norms),
        "gradients": worst(layout_gradients, gradients),
        "weights": worst(layout_weights, weights),
    }


@pytest.mark.parametrize("layout", layouts(), ids=lambda v: "-".join(f"{k}{n}" for k, n in v.items()))
def test_layout_equals_one_process(tmp_path: Path, layout: dict[str, int]) -> None:
    job = tiny_job(tmp_path, processes=layout["replica"] * layout["shard"], layout=layout)
    assert max(compare(job).values()) < BOUND


def test_tied_embeddings_and_uneven_parts(tmp_path: Path) -> None:
    layout = {"replica": 1, "shard": 3, "zero": 3, "microbatch": 1}
    job = tiny_job(tmp_path, processes=3, layout=layout, model={"tied_embeddings": True}, data={"global_batch": 9})
    assert max(compare(job).values()) < BOUND


def test_another_order_of_axes(tmp_path: Path) -> None:
    order = ["shard", "pipeline", "context", "replica", "tensor"]
    job = tiny_job(tmp_path, processes=4, layout={"replica": 2, "shard": 2, "order": order})
    assert max(compare(job).values()) < BOUND
