"""Real traces of other people's programs, of two CPU ranks: what each collective was for, and what was computed again.

The programs know nothing of Meshwright: PyTorch's own profiler, with its own annotation of steps or none.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function, schedule
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from meshwright.account import StepAccount
from meshwright.account.intervals import clip, length, union
from meshwright.record import Step
from meshwright.record.kineto import measure_trace, read_trace

# Large enough that operators take most of a step.
WIDTH, ROWS, STEPS = 256, 256, 3


Build = Callable[[nn.Sequential], nn.Module]


class Block(nn.Module):
    """Two matrices and what lies between; its forward pass runs again in the backward pass if it is told how."""

    def __init__(self, again: str = "") -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.again = again

    def inner(self, x: Tensor) -> Tensor:
        with record_function("inner"):
            return x + self.down(torch.nn.functional.gelu(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.again:
            return checkpoint(self.inner, x, use_reentrant=self.again == "reentrant")
        return self.inner(x)


def plain(model: nn.Sequential) -> nn.Module:
    return model


def replicated(model: nn.Sequential) -> nn.Module:
    return DistributedDataParallel(model, bucket_cap_mb=1)


def sharded(model: nn.Sequential) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data",))
    for block in (*model, model):
        fully_shard(block, mesh=mesh)
    return model


def split(model: nn.Sequential) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("inner",))
    for block in model:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def compiled(model: nn.Sequential) -> nn.Module:
    for block in model:
        block.compile(backend="aot_eager")
    return model


def traced(folder: Path, build: Build, again: str, *, stepped: bool, clip: bool, closure: bool, ranks: int) -> None:
    """Train on one rank and leave its trace; stepped: the profiler is told where steps end."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    if ranks > 1:
        dist.init_process_group("gloo")
    model = build(nn.Sequential(*(Block(again) for _ in range(3))))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    batches: Any = DataLoader(torch.randn(ROWS * (STEPS + 1), WIDTH), batch_size=ROWS)  # type: ignore[arg-type]
    path = folder / f"rank-{dist.get_rank() if ranks > 1 else 0}.json"
    cycle = schedule(wait=0, warmup=1, active=STEPS, repeat=1) if stepped else None
    with profile(
        activities=[ProfilerActivity.CPU],
        schedule=cycle,
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
    ) as profiler:
        for batch in batches:

            def passes(batch: Tensor = batch) -> Tensor:
                optimizer.zero_grad()
                loss = model(batch.requires_grad_()).square().mean()
                loss.backward()
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                return loss

            if closure:
                optimizer.step(passes)
            else:
                passes()
                optimizer.step()
            if stepped:
                profiler.step()
    if ranks > 1:
        dist.destroy_process_group()


def steps_of(
    folder: Path,
    build: Build,
    *,
    again: str = "",
    stepped: bool = True,
    clip: bool = False,
    closure: bool = False,
    ranks: int = 2,
) -> tuple[list[Step], list[str]]:
    """The steps of rank 0."""

    def work() -> None:
        traced(folder, build, again, stepped=stepped, clip=clip, closure=closure, ranks=ranks)

    run_ranks(ranks, work)
    return measure_trace(read_trace(folder / "rank-0.json"))


def comm(account: StepAccount) -> set[str]:
    """Purposes of exposed transfers."""
    return {name.removeprefix("comm.") for name, s in account.rows() if name.startswith("comm.") and s > 0}


def purposes(steps: list[Step]) -> set[str]:
    """Purposes of all transfers, exposed or not."""
    return {transfer.purpose for step in steps for transfer in step.measured.transfers}


def closes(steps: list[Step]) -> None:
    for step in steps:
        account = step.measured.account
        assert account.total() == pytest.approx(step.measured.wall_s, rel=1e-6)
        assert account.compute > 0 and account.optimizer > 0 and account.host > 0 and account.input > 0
        detail = step.detail
        assert detail is not None
        assert sum(detail.host.values()) == pytest.approx(account.host, abs=1e-9)
        exposed = sum(group.exposed_s for group in detail.groups)
        assert exposed == pytest.approx(sum(s for name, s in account.rows() if name.startswith("comm.")), abs=1e-9)


def test_a_program_of_one_process_needs_nothing_but_its_operators(tmp_path: Path) -> None:
    steps, notes = steps_of(tmp_path, plain, ranks=1)
    closes(steps)
    # The profiler's own numbers.
    assert [step.measured.step for step in steps] == list(range(1, STEPS + 1)) and not notes
    assert all(step.measured.account.recompute == 0 for step in steps) and not purposes(steps)
    named = [group.purpose for step in steps if step.detail for group in step.detail.kernels[:1]]
    assert set(named) == {"matrix products"}


def test_passes_that_an_optimizer_makes_itself_are_no_update(tmp_path: Path) -> None:
    """Lightning hands both passes to the optimizer's step, as a closure."""
    steps, _ = steps_of(tmp_path, plain, closure=True, clip=True, ranks=1)
    assert len(steps) == STEPS
    for one in steps:
        account, detail = one.measured.account, one.detail
        assert detail is not None and account.closes(one.measured.wall_s)
        products = sum(group.seconds for group in detail.kernels if group.purpose == "matrix products")
        assert account.compute > products > 0 and account.optimizer > 0


def test_steps_are_bounded_by_the_optimizer_where_nobody_tells_them(tmp_path: Path) -> None:
    steps, notes = steps_of(tmp_path, plain, stepped=False, ranks=1)
    closes(steps)
    # What comes before the first optimizer step's end has no begin.
    assert len(steps) == STEPS and "end of one optimizer step" in " ".join(notes)
    # No moment is lost between two.
    for one, following in pairwise(steps):
        assert one.measured.end_s == following.measured.start_s


def test_replicas_average_gradients_beside_the_backward_pass(tmp_path: Path) -> None:
    steps, _ = steps_of(tmp_path, replicated)
    closes(steps)
    # Once it sends buckets' sizes around.
    assert "replica" in purposes(steps[:1]) <= {"replica", "control"} and purposes(steps[1:]) == {"replica"}
    assert any(step.measured.overlapped.get("replica", 0.0) > 0 for step in steps)


@pytest.mark.parametrize("clip", [False, True], ids=["", "clipped"])
def test_shards_are_gathered_and_reduced(tmp_path: Path, clip: bool) -> None:
    """The norm of all of them is a small sync in the same group, and its time the optimizer's."""
    steps, _ = steps_of(tmp_path, sharded, clip=clip)
    closes(steps)
    assert purposes(steps) == ({"shard", "control"} if clip else {"shard"})
    # Three blocks, each gathered twice and reduced once; the last is kept from the forward pass to the backward pass.
    kinds = [transfer.purpose for transfer in steps[1].measured.transfers]
    assert kinds.count("shard") in (8, 9) and kinds.count("control") == clip


def test_dtensors_sums_are_the_tensor_axis(tmp_path: Path) -> None:
    steps, _ = steps_of(tmp_path, split)
    closes(steps)
    assert purposes(steps) == {"tensor"} == comm(steps[1].measured.account)
    assert all(step.measured.account.recompute == 0 for step in steps)


@pytest.mark.parametrize("again", ["reentrant", "hooked"])
@pytest.mark.parametrize(("build", "ranks"), [(plain, 1), (sharded, 2)], ids=["plain", "sharded"])
def test_what_a_backward_pass_computes_again_is_recompute(tmp_path: Path, build: Build, ranks: int, again: str) -> None:
    steps, _ = steps_of(tmp_path, build, again=again, ranks=ranks)
    closes(steps)
    trace = read_trace(tmp_path / "rank-0.json")
    inner = [mark for mark in trace.marks() if mark.name == "inner"]
    bounds = {mark.name: mark for mark in trace.marks()}
    for step in steps:
        whole = bounds[f"ProfilerStep#{step.measured.step}"]
        mine = [m for m in inner if whole.start_s <= m.start_s < whole.end_s]
        # Three blocks forward, and again.
        assert len(mine) == 6
        operators = union(
            (max(e.start_s, m.start_s), min(e.end_s, m.end_s))
            for m in mine[3:]
            for e in trace.within(m.start_s, m.end_s, {"cpu_op"})
            if e.name.startswith("aten::")
        )
        inside = [s for m in mine[3:] for s in clip(operators, m.start_s, m.end_s)]
        assert step.measured.account.recompute == pytest.approx(length(inside), rel=0.1)


def test_recompute_of_a_compiled_region_is_a_note_and_no_guess(tmp_path: Path) -> None:
    steps, notes = steps_of(tmp_path, compiled, again="hooked", ranks=1)
    assert all(step.measured.account.recompute == 0 for step in steps[1:])
    assert any("compiled" in note for note in notes)


def test_gradients_of_gradients_are_no_recompute(tmp_path: Path) -> None:
    def work() -> None:
        torch.set_num_threads(1)
        model = nn.Sequential(*(Block() for _ in range(3)))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(2):
                x = torch.randn(ROWS, WIDTH, requires_grad=True)
                loss = model(x).square().mean()
                (slope,) = torch.autograd.grad(loss, x, create_graph=True)
                (loss + slope.square().sum()).backward()
                optimizer.step()
                profiler.step()
        profiler.export_chrome_trace(str(tmp_path / "rank-0.json"))

    run_ranks(1, work)
    steps, notes = measure_trace(read_trace(tmp_path / "rank-0.json"))
    assert all(step.measured.account.recompute == 0 for step in steps)
    assert any("Gradients of gradients" in note for note in notes)
