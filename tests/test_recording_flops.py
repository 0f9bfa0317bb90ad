"""The FLOPs that a recorder counts are those that torch's own counter counts, for programs of many kinds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import Read
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from meshwright.trace import record


class Attention(nn.Module):
    """Of four heads, on as many keys, and what comes before and after."""

    def __init__(self, *, causal: bool = True) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(32, 96), nn.Linear(32, 32)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in self.enter(x).chunk(3, -1))
        heads = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.leave(heads.transpose(1, 2).flatten(2))


class Again(nn.Module):
    """Runs its forward pass again in the backward pass."""

    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.first, self.inner, self.reentrant = nn.Linear(32, 32), inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        y: Any = checkpoint(self.inner, self.first(x), use_reentrant=self.reentrant)
        return y


class Products(nn.Module):
    """Batches of matrices, sums by their letters, a product with a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.vector = nn.Parameter(torch.ones(32, 16)), nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bsd,df->bsf", x, self.matrix)
        scores = torch.baddbmm(torch.zeros(1), y, y.transpose(1, 2)) @ y
        return scores @ self.vector


def middle() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))


def images() -> nn.Module:
    # Channels last of what is (batch, sequence, width): an image of one row.
    return nn.Sequential(
        nn.Unflatten(1, (2, 8)),
        nn.Conv2d(2, 6, (3, 5), stride=(1, 2), padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 2, 3, stride=2, dilation=2),
        nn.Conv2d(2, 4, 3),
    )


PROGRAMS: dict[str, Callable[[], nn.Module]] = {
    "linear": middle,
    "attention": Attention,
    "attention to all": lambda: Attention(causal=False),
    "its own transformer": lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True),
    "products": Products,
    "images": images,
    "again": lambda: Again(middle(), reentrant=False),
    "again, reentrant": lambda: Again(middle(), reentrant=True),
    "recurrent": lambda: First(nn.GRU(32, 16, batch_first=True)),
    "frozen": lambda: nn.Sequential(nn.Linear(32, 32).requires_grad_(False), nn.Linear(32, 32)),
}


class First(nn.Module):
    """What a module returns first."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


def batch() -> Tensor:
    return torch.randn(3, 16, 32)


def train(model: nn.Module, run: Path, microbatches: int = 1, **options: Any) -> Read:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with record(run, model, optimizer, every_steps=0, **options) as recorder:
        for _ in range(3):
            for _ in range(microbatches):
                model(batch()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.next_step()
    return Read(run)


def expected(model: nn.Module) -> int:
    """By torch's counter, in which recompute and fused attention's making the scores once more would count too."""
    plain = Again.forward
    Again.forward = lambda self, x: self.inner(self.first(x))
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(batch()).square().mean().backward()
    finally:
        Again.forward = plain
    return counter.get_total_flops()


@pytest.mark.parametrize("program", PROGRAMS)
def test_flops_are_those_of_torchs_own_counter(tmp_path: Path, program: str) -> None:
    torch.manual_seed(0)
    model = PROGRAMS[program]()
    run = train(model, tmp_path / "run")
    assert run.faults() == []
    assert run.program.flops_per_step == expected(model), run.program.flops_from
    assert run.program.recompute == program.startswith("again")
    assert run.program.precision == "fp32"


def test_all_microbatches_of_a_step_count(tmp_path: Path) -> None:
    model = middle()
    assert train(model, tmp_path / "run", 3).program.flops_per_step == 3 * expected(model)


def test_what_is_given_is_believed(tmp_path: Path) -> None:
    run = train(middle(), tmp_path / "run", flops_per_step=5e9, precision="bf16")
    assert (run.program.flops_per_step, run.program.flops_from, run.program.precision) == (5e9, "given", "bf16")


def test_what_is_compiled_is_not_counted_and_says_so(tmp_path: Path) -> None:
    model = Attention()
    model.compile(backend="aot_eager")
    run = train(model, tmp_path / "run")
    assert run.program.flops_per_step is None and "torch.compile" in run.program.flops_from
