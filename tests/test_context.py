"""The context axis: attention over a sequence that ranks share equals attention over the whole of it, in
training, and what goes wrong there is found and named."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from cases import Case, build_job
from jobs import cpu_cluster, tiny_job
from ranks import run_ranks
from torch import Tensor
from training import assert_same_training, new_run, train_in_turns, train_rank
from verifying import Fault, References, assert_agrees, verdict_of

from meshwright.explain.verification import Cause
from meshwright.launch.shrink import shrink_job
from meshwright.parallel import apply, build_mesh, context, parallelize, ring, start_distributed, stop_distributed
from meshwright.record import Memory, RunFolder, read_events, read_metrics
from meshwright.spec import Job, Layout, SettingError
from meshwright.spec.decode import planning_job

# --- In training ----------------------------------------------------------------------------------------------------


def named(choices: dict[str, Any]) -> str:
    return "-".join(f"{name}{value}" for name, value in choices.items())


def compiled_in_one_graph(_job: Job) -> AbstractContextManager[object]:
    """No fault: blocks are compiled as on a GPU, by a compiler that takes whole graphs and nothing less."""
    stack, right = ExitStack(), apply.prepare_block
    compiler = partial(torch.compile, backend="aot_eager", fullgraph=True)
    stack.enter_context(mock.patch.object(torch, "compile", compiler))

    def compiled(*arguments: Any, **options: Any) -> None:
        right(*arguments, **{**options, "compiled": True})

    stack.enter_context(mock.patch.object(apply, "prepare_block", compiled))
    return stack


# The compiler looks at the gradients of what it is given, which torch warns of.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    "choices", [{"recompute": "selective"}, {"context_form": "all-to-all", "documents": True}], ids=named
)
def test_a_compiled_block_stays_one_graph(
    folder: Path, references: References, tmp_path: Path, choices: dict[str, Any]
) -> None:
    job = build_job(folder, Case(context=2, **choices), run={"folder": str(tmp_path)})
    assert_agrees(verdict_of(job, references, compiled_in_one_graph))


def count_passes(job: Job, folder: RunFolder, attempt: int) -> int:
    """How often this rank's ring passed something on in a run of one step."""
    passed = mock.Mock(wraps=ring.pass_on)
    with mock.patch.object(ring, "pass_on", passed):
        train_rank(job, folder, attempt)
    return passed.call_count


@pytest.mark.parametrize("size", [2, 3])
def test_only_whole_recompute_runs_the_ring_again(tmp_path: Path, size: int) -> None:
    found: dict[str | int, int] = {}
    for recompute in ("none", "selective", 1, "full"):
        layout = {"context": size, "recompute": recompute, "microbatch": "all"}
        data, run = {"held_out": 0.0, "sequence": 8 * size}, {"name": f"run-{recompute}", "steps": 1}
        job = tiny_job(tmp_path, processes=size, layout=layout, data=data, run=run)
        found[recompute] = run_ranks(size, count_passes, job, *new_run(job))[0]
    forward, layers = (size - 1), job.model.layers
    assert found["none"] == found["selective"] == layers * (2 * forward + size)
    assert found[1] == found["none"] + forward
    assert found["full"] == found["none"] + layers * forward


def run_of(job: Job) -> RunFolder:
    folder, attempt = new_run(job)
    run_ranks(job.layout.world_size, train_rank, job, folder, attempt)
    return folder


def adam_job(folder: Path, name: str, axes: dict[str, Any], **sections: Any) -> Job:
    processes = torch.tensor([axes.get(axis, 1) for axis in ("replica", "shard", "context", "tensor")]).prod().item()
    table: dict[str, Any] = {"run": {"name": name}, "optimizer": {"name": "adamw", "learning_rate": 0.01}, **sections}
    return tiny_job(folder, processes=int(processes), layout={"microbatch": 2, **axes}, **table)


def test_states_are_divided_over_shard_and_context(tmp_path: Path) -> None:
    held: list[list[tuple[float, ...]]] = []
    for name, axes in (("one", {"shard": 4}), ("two", {"shard": 2, "context": 2}), ("three", {"context": 4})):
        events = read_events(run_of(adam_job(tmp_path, name, axes, run={"name": name, "steps": 2})), 0)
        accounts = [line.account for rank in sorted(events) for line in events[rank] if isinstance(line, Memory)]
        # Buffers are what is gathered after a forward pass: the output layer, whatever the axes' names.
        held.append([(a.parameters, a.gradients, a.optimizer_states, a.communication_buffers) for a in accounts])
    assert len(held[0]) == 4
    assert held[0] == held[1] == held[2]


def test_a_checkpoint_goes_on_in_other_layouts(tmp_path: Path) -> None:
    axes: list[dict[str, Any]] = [{"context": 2, "tensor": 2}, {"shard": 2, "context": 2}, {"replica": 2, "context": 2}]
    saving = {"every_steps": 1, "keep": 0}
    jobs = [adam_job(tmp_path, "parts", sizes, checkpoint=saving) for sizes in axes]
    whole = adam_job(tmp_path, "whole", {"shard": 2}, checkpoint=saving)
    found = train_in_turns(list(zip(jobs, (2, 4, 5), strict=True)))
    assert_same_training(whole, found, train_in_turns([(whole, 5)]))


def test_held_out_loss_is_that_of_one_process(tmp_path: Path) -> None:
    found: list[list[float | None]] = []
    for name, axes in (("one", {}), ("two", {"context": 2}), ("three", {"context": 2, "context_form": "all-to-all"})):
        job = adam_job(tmp_path, name, axes, run={"name": name, "steps": 2})
        found.append([line.held_out_loss for line in read_metrics(run_of(job))[1]])
    assert len(found[0]) == 2 and None not in found[0]
    assert found[1] == pytest.approx(found[0], rel=1e-5) and found[2] == pytest.approx(found[0], rel=1e-5)


# --- Faults, each planted in the ranks of a layout that is right without it -----------------------------------------


def places_of_the_wrong_chunk(_job: Job) -> AbstractContextManager[object]:
    """Tokens of the early chunk are given the places of the late one, and the other way round."""

    def swap(places: Tensor, held: Tensor) -> Tensor:
        return places[..., held.roll(len(held) // 2)]

    return mock.patch.object(context, "cut_places", swap)


def unbalanced(change: Callable[[int, int, ring.Piece], ring.Piece]) -> AbstractContextManager[Any]:
    """A mask that is wrong for chunks of different ranks: what change(rank, source, piece) gives is computed."""
    right = ring.pieces

    def wrong(query: Tensor, sight: Any, rank: int, source: int, size: int, *, fused: bool) -> Iterator[ring.Piece]:
        assert fused
        for piece in right(query, sight, rank, source, size, fused=fused):
            yield change(rank, source, piece)

    return mock.patch.object(ring, "pieces", wrong)


def future_seen(_job: Job) -> AbstractContextManager[Any]:
    """The early chunk sees the keys of ranks behind it."""
    everything = slice(None)
    return unbalanced(lambda rank, source, piece: piece._replace(rows=everything) if source > rank else piece)


def past_missed(job: Job) -> AbstractContextManager[Any]:
    """The late chunk misses the early chunks of ranks before it."""
    early = slice(0, job.data.sequence // job.layout.context // 2)
    return unbalanced(lambda rank, source, piece: piece._replace(rows=early) if source < rank else piece)


@pytest.fixture(scope="module")
def cause_of(folder: Path, references: References) -> Callable[..., Cause]:
    """What verify makes of a fault in a layout."""

    def find(fault: Fault, **choices: Any) -> Cause:
        case = Case(**choices)
        verdict = verdict_of(build_job(folder, case, run={"name": f"{fault.__name__}-{case}"}), references, fault)
        assert not verdict.agrees
        assert verdict.cause is not None
        return verdict.cause

    return find


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("axes", [{"context": 2}, {"context": 2, "tensor": 2, "documents": True}], ids=named)
def test_places_of_the_wrong_chunk_are_named(cause_of: Callable[..., Cause], axes: Any, family: str) -> None:
    cause = cause_of(places_of_the_wrong_chunk, family=family, **axes)
    assert cause.module == "rank 0, token 0"
    assert "the places of the two chunks that it holds" in cause.likely


@pytest.mark.parametrize("fault", [future_seen, past_missed])
@pytest.mark.parametrize("axes", [{"context": 2}, {"context": 2, "tensor": 2}, {"context": 4}], ids=named)
def test_chunks_wrongly_seen_or_missed_are_named(cause_of: Callable[..., Cause], fault: Fault, axes: Any) -> None:
    cause = cause_of(fault, **axes)
    assert cause.module == "blocks.0.attention.attend"
    assert "its queries see keys that they should not, or miss some" in cause.likely


def late_chunks_turned(_job: Job) -> AbstractContextManager[object]:
    """All-to-all puts the late chunks in the order of ranks, which is not that of the sequence."""
    return mock.patch.object(Tensor, "flip", lambda tensor, *_dims: tensor)


@pytest.mark.parametrize("axes", [{"context": 2}, {"context": 2, "tensor": 2}], ids=named)
def test_tokens_wrongly_exchanged_are_named(cause_of: Callable[..., Cause], axes: Any) -> None:
    cause = cause_of(late_chunks_turned, context_form="all-to-all", **axes)
    assert cause.module == "blocks.0.attention.attend"
    assert "in the order of the whole sequence" in cause.likely


# --- What is made small, and what is refused ------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["ring", "all-to-all"])
@pytest.mark.parametrize(("context_size", "tensor"), [(2, 1), (3, 1), (8, 1), (2, 4), (16, 2), (6, 2)])
def test_a_layout_is_made_small_enough_to_verify(tmp_path: Path, form: str, context_size: int, tensor: int) -> None:
    sizes = {"context": context_size, "tensor": tensor, "shard": 2, "context_form": form}
    settings = [f"layout.{name}={value}" for name, value in sizes.items()]
    model = "llama3.1-405b" if context_size % 3 else "llama3.2-3b"  # 128 heads, or 24
    job = planning_job(model=model, gpus="8x8xh100", sequence=12288, global_batch=64, settings=settings)
    small = shrink_job(job, tmp_path, local=cpu_cluster)
    assert small.layout.context > 1 and (small.layout.tensor > 1) == (tensor > 1) and small.layout.shard == 2
    assert small.layout.context_form == form
    assert small.data.sequence % (2 * small.layout.context * small.layout.tensor) == 0
    ranks, many = (layout.tensor * layout.context for layout in (small.layout, job.layout))
    if form == "all-to-all":
        assert (small.model.kv_heads < ranks) == (job.model.kv_heads < many)


def test_another_models_attention_cannot_be_spread() -> None:
    def refused() -> str:
        mesh = build_mesh(layout, start_distributed())
        with pytest.raises(SettingError) as told:
            parallelize(torch.nn.Sequential(torch.nn.Linear(2, 2)), layout, mesh, blocks=["0"])
        # Rank 0 has the store by which the other may still be meeting it.
        torch.distributed.barrier()
        stop_distributed()
        return str(told.value)

    layout = Layout(context=2, precision="fp32")
    assert all("layout.context = 2: where another model's attention is" in line for line in run_ranks(2, refused))


@pytest.mark.parametrize(
    ("settings", "reason", "nearest"),
    [
        ({"context": 5}, "data.sequence = 24", "layout.context = 4, or data.sequence = 30"),
        ({"context": 2, "tensor": 4}, "data.sequence = 24", "layout.context = 1, or data.sequence = 32"),
        ({"context": 3, "context_form": "all-to-all"}, "does not divide model.heads = 4", '"ring"'),
        ({"context": 2, "shard": 3}, "layout.replica x layout.shard = 3", "layout.shard = 2"),
        ({"context_form": "all-to-all"}, "means nothing with layout.context = 1", "layout.context = 2"),
    ],
    ids=str,
)
def test_what_cannot_be_split_is_refused(tmp_path: Path, settings: dict[str, Any], reason: str, nearest: str) -> None:
    with pytest.raises(SettingError) as told:
        tiny_job(tmp_path, processes=16, model={"feed_forward": 92}, layout=settings)
    assert reason in str(told.value) and nearest in str(told.value)


def test_what_is_offered_for_a_refused_context_is_let_through(tmp_path: Path) -> None:
    """Heads that tensor leaves cannot be exchanged by two: nothing is left of the axis, or it is a ring."""
    model = {"feed_forward": 92, "heads": 12, "kv_heads": 12, "head_dim": 8}
    none = "layout.context = 1 without layout.context_form"
    layout = {"context": 2, "tensor": 4, "context_form": "all-to-all"}
    for sequence, nearest in (
        (32, 'layout.context_form = "ring"'),
        (24, none),
    ):
        with pytest.raises(SettingError) as told:
            tiny_job(tmp_path, processes=16, model=model, data={"sequence": sequence}, layout=layout)
        assert told.value.nearest == nearest
    tiny_job(tmp_path, processes=8, model=model, data={"sequence": 32}, layout=layout | {"context_form": "ring"})
    tiny_job(tmp_path, processes=4, model=model, data={"sequence": 24}, layout={"tensor": 4})
