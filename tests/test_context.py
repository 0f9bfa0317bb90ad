"""The context axis: attention over a sequence that ranks share equals attention over the whole of it, as a function and
in training, and what goes wrong there is found and named."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from jobs import cpu_cluster, tiny_job
from ranks import run_ranks
from test_equivalence import build_job, case_of
from torch import Tensor
from training import new_attempt, new_run, train_rank, weights
from verifying import Fault, References, assert_agrees, verdict_of

from meshwright.explain.verification import Cause
from meshwright.launch.shrink import shrink_job, write_text
from meshwright.models import attend, build_mask
from meshwright.parallel import apply, build_mesh, context, parallelize, ring, start_distributed, stop_distributed
from meshwright.parallel.context import attend_over, held_tokens
from meshwright.record import Memory, RunFolder, read_events, read_metrics
from meshwright.spec import Job, Layout, SettingError
from meshwright.spec.decode import planning_job

# --- As a function --------------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """Of one call of attention."""

    heads: int = 4
    kv_heads: int = 2
    sequence: int = 48
    width: int = 8
    window: int = 0
    documents: bool = False
    dtype: torch.dtype = torch.float64


def inputs(shape: Shape) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Query, key and value, a gradient of the output, and documents; the same on every rank."""
    torch.manual_seed(7)
    batch = 2
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    parts = [torch.randn(batch, h, shape.sequence, shape.width, dtype=torch.float64) for h in heads]
    gradient = torch.randn(batch, shape.heads, shape.sequence, shape.width, dtype=torch.float64)
    # Documents that begin at other places in each sample, inside of chunks and at their edges.
    begins = torch.zeros(batch, shape.sequence, dtype=torch.int32)
    begins[0, [5, 6, shape.sequence // 2]] = 1
    begins[1, [shape.sequence // 4, shape.sequence - 1]] = 1
    documents = begins.cumsum(1).int() if shape.documents else None
    return parts, gradient, documents


def whole_attention(shape: Shape) -> list[Tensor]:
    """What is mixed, and the gradients of query, key and value, in double precision on one rank."""
    parts, gradient, documents = inputs(shape)
    leaves = [part.requires_grad_() for part in parts]
    mask = build_mask(shape.sequence, documents, shape.window, torch.device("cpu"))
    mixed = attend(leaves[0], leaves[1], leaves[2], mask)
    mixed.backward(gradient)
    return [mixed.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def shared_attention(shapes: list[Shape], size: int, form: Any, patches: dict[str, Any]) -> list[list[Tensor]]:
    """The same of this rank's tokens, by a form of context, for each shape."""
    torch.set_num_threads(1)
    device = start_distributed()
    layout = Layout(context=size, context_form=form)
    mesh = build_mesh(layout, device)["context"]
    found: list[list[Tensor]] = []
    for shape in shapes:
        parts, gradient, documents = inputs(shape)
        held = held_tokens(shape.sequence, size, mesh.get_local_rank(), device)
        leaves = [part[:, :, held].to(shape.dtype).requires_grad_() for part in parts]
        mask = documents if form == "ring" else build_mask(shape.sequence, documents, shape.window, device)
        with ExitStack() as patched:
            for name, function in patches.items():
                patched.enter_context(mock.patch.object(ring, name, function))
            mixed = attend_over(layout, mesh, shape.window)(leaves[0], leaves[1], leaves[2], mask)
            mixed.backward(gradient[:, :, held].to(shape.dtype))
        found.append([mixed.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    stop_distributed()
    return found


def together(parts: list[Tensor]) -> Tensor:
    """A tensor [B, heads, S, E] from the ranks' tokens of it: chunks from the start, then the others from the end."""
    chunks = [part.chunk(2, dim=2) for part in parts]
    return torch.cat([*(early for early, _ in chunks), *(late for _, late in reversed(chunks))], dim=2)


def assert_same_attention(shapes: list[Shape], size: int, form: str, patches: dict[str, Any] | None = None) -> None:
    """Fail where what ranks mix, or a gradient, differs from one rank's."""
    ranks = run_ranks(size, shared_attention, shapes, size, form, patches or {})
    for number, shape in enumerate(shapes):
        expected = whole_attention(shape)
        assert len(expected) == 4
        found = zip(*(rank[number] for rank in ranks), strict=True)
        for what, wanted, parts in zip(("mixed", "query", "key", "value"), expected, found, strict=True):
            assert all(part.dtype == shape.dtype for part in parts)
            difference = (together(list(parts)).double() - wanted).norm() / wanted.norm()
            bounds = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}
            assert difference < bounds[shape.dtype], (form, size, shape, what)


MASKS: list[dict[str, Any]] = [{}, {"documents": True}, {"window": 7}, {"window": 30, "documents": True}]
PRECISIONS = (torch.float64, torch.float32)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("form", ["ring", "all-to-all"])
def test_attention_of_sharing_ranks_is_that_of_one(form: str, size: int) -> None:
    heads = [(size, 1), (size, size), (2 * size, 2)]
    shapes = [Shape(heads=h, kv_heads=k, dtype=d, **mask) for h, k in heads for d in PRECISIONS for mask in MASKS]
    assert_same_attention(shapes, size, form)


def test_a_ring_needs_no_head_for_each_rank() -> None:
    assert_same_attention([Shape(heads=3, kv_heads=1), Shape(heads=1, kv_heads=1, documents=True)], 4, "ring")


def test_small_tiles_are_put_together() -> None:
    # Neither divides the 12 queries of a chunk.
    for rows in (1, 5):
        assert_same_attention([Shape(**mask) for mask in MASKS], 2, "ring", {"tile_rows": lambda *_, rows=rows: rows})


def test_heads_that_no_kernel_takes_are_computed_plainly() -> None:
    assert_same_attention([Shape(dtype=dtype) for dtype in PRECISIONS], 3, "ring", {"choose_kernel": lambda _: None})


def test_sixteen_bits_round_no_more_than_themselves() -> None:
    assert_same_attention([Shape(dtype=torch.bfloat16), Shape(dtype=torch.bfloat16, documents=True)], 2, "ring")


def computed(rank: int, size: int, sight: ring.Sight, chunk: int, *, fused: bool) -> Iterator[tuple[int, int, int]]:
    """Every turn of a ring, and the pairs of tokens of which a rank computes there what is seen."""
    query = torch.empty(1, 1, 2 * chunk, 4)
    for source in range(size):
        of_queries, of_keys = (held_tokens(2 * size * chunk, size, r, torch.device("cpu")) for r in (rank, source))
        for piece in ring.pieces(query, sight, rank, source, size, fused=fused):
            rows, columns = of_queries[piece.rows], of_keys[piece.columns]
            seen = torch.ones(len(rows), len(columns), dtype=torch.bool) if piece.seen is None else piece.seen
            if piece.causal:
                seen = seen.tril()
            yield from ((source, rows[i].item(), columns[j].item()) for i, j in seen.nonzero().tolist())  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize(("window", "fused"), [(0, True), (0, False), (9, False)])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_compute_every_visible_pair_once_and_equally_many(size: int, window: int, fused: bool) -> None:
    chunk = 6
    found = [list(computed(rank, size, ring.Sight(None, window), chunk, fused=fused)) for rank in range(size)]
    pairs_seen = sorted((query, key) for rank in found for _, query, key in rank)
    past = [(q, k) for q in range(2 * size * chunk) for k in range(q + 1) if not window or q - k < window]
    assert pairs_seen == past
    if window:
        return
    for rank, each in enumerate(found):
        turns = [sum(source == turn for turn, *_ in each) for source in range(size)]
        # In its own turn the diagonals of two chunks too.
        assert turns == [2 * chunk**2 + (chunk if source == rank else 0) for source in range(size)]


# --- In training ----------------------------------------------------------------------------------------------------


def a_job(
    folder: Path, *, recompute: str | int = "none", documents: bool = False, fault: str = "", **choices: Any
) -> Job:
    """The equivalence tests' job with ranks along context; `choices`: axes, form, zero, family, accumulation."""
    size, form = choices.pop("context"), choices.pop("form", "ring")
    case = case_of(**choices)
    part = 2 * size * case.tensor
    sequence = -(-32 // part) * part
    return build_job(
        folder,
        case,
        layout={"context": size, "context_form": form, "recompute": recompute},
        cluster={"processes": size * case.processes},
        model={"max_positions": sequence} if case.family == "gpt2" else {},
        data={"attention": "document" if documents else "sample", "sequence": sequence},
        run={"name": f"{fault}-{case}-{size}-{form}-{documents}-{recompute}".strip("-")},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where text, tokens and runs are, for all cases."""
    folder = tmp_path_factory.mktemp("context")
    write_text(folder)
    return folder


@pytest.fixture(scope="module")
def references(folder: Path) -> References:
    return References(folder)


LAYOUTS: list[dict[str, Any]] = [
    {"context": 2},
    {"context": 2, "form": "all-to-all", "family": "gpt2", "documents": True},
    {"context": 4, "family": "mistral", "documents": True},
    {"context": 4, "form": "all-to-all", "family": "mistral", "recompute": "selective"},
    {"context": 2, "shard": 2, "accumulation": 4, "recompute": "full"},
    {"context": 2, "shard": 2, "zero": 1, "accumulation": 4, "family": "qwen3", "form": "all-to-all"},
    {"context": 2, "shard": 2, "zero": 2, "recompute": "selective", "family": "gpt2"},
    {"context": 2, "zero": 1, "accumulation": 4, "family": "mistral", "recompute": 1},
    {"context": 2, "replica": 2, "family": "gpt2", "documents": True},
    {"context": 2, "tensor": 2, "family": "qwen3", "documents": True},
    {"context": 2, "tensor": 2, "shard": 2, "family": "gpt2", "recompute": "selective", "accumulation": 4},
    {"context": 2, "tensor": 4, "form": "all-to-all"},
    {"context": 2, "replica": 2, "shard": 2, "zero": 2, "form": "all-to-all"},
    {"context": 4, "tensor": 2, "recompute": "full"},
    # A rank of tensor has the end of one chunk and the beginning of another.
    {"context": 2, "tensor": 3, "form": "all-to-all", "family": "gpt2"},
    {"context": 3, "family": "qwen3", "recompute": "selective"},
]


def named(choices: dict[str, Any]) -> str:
    return "-".join(f"{name}{value}" for name, value in choices.items())


@pytest.mark.parametrize("choices", LAYOUTS, ids=named)
def test_layout_equals_one_process(folder: Path, references: References, choices: dict[str, Any]) -> None:
    assert_agrees(verdict_of(a_job(folder, **choices), references))


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
@pytest.mark.parametrize("choices", [{"recompute": "selective"}, {"form": "all-to-all", "documents": True}], ids=named)
def test_a_compiled_block_stays_one_graph(folder: Path, references: References, choices: dict[str, Any]) -> None:
    job = a_job(folder, context=2, fault="compiled", **choices)
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
        held.append([(a.parameters, a.gradients, a.optimizer_states) for a in accounts])
    assert len(held[0]) == 4
    assert held[0] == held[1] == held[2]


def test_a_checkpoint_goes_on_in_other_layouts(tmp_path: Path) -> None:
    whole = adam_job(tmp_path, "whole", {"shard": 2})
    expected = run_of(whole)
    axes: list[dict[str, Any]] = [{"context": 2, "tensor": 2}, {"shard": 2, "context": 2}, {"replica": 2, "context": 2}]
    first, *others = (adam_job(tmp_path, "parts", sizes, checkpoint={"every_steps": 2, "keep": 0}) for sizes in axes)
    folder = run_of(first)
    for step, job in zip((2, 4), others, strict=True):
        for later in folder.saved_steps():
            if later > step:
                shutil.rmtree(folder.checkpoint(later))
        run_ranks(job.layout.world_size, train_rank, job, folder, new_attempt(folder, job))
    for line, wanted in zip(read_metrics(folder)[0], read_metrics(expected)[0], strict=True):
        assert line.loss == pytest.approx(wanted.loss, rel=1e-5)
        assert line.gradient_norm == pytest.approx(wanted.gradient_norm, rel=1e-5)
    end = weights(whole, expected)
    for name, tensor in weights(first, folder).items():
        # Adam amplifies round-off where a gradient is nearly zero, so the tensor's norm is compared, not its elements.
        assert torch.linalg.vector_norm(tensor - end[name]) < 1e-5 * torch.linalg.vector_norm(end[name]), name


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
        verdict = verdict_of(a_job(folder, fault=fault.__name__, **choices), references, fault)
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
@pytest.mark.parametrize("axes", [{"context": 2}, {"context": 2, "shard": 2}, {"context": 4}], ids=named)
def test_chunks_wrongly_seen_or_missed_are_named(cause_of: Callable[..., Cause], fault: Fault, axes: Any) -> None:
    cause = cause_of(fault, **axes)
    assert cause.module == "blocks.0.attention.output"
    assert "its queries see keys that they should not, or miss some" in cause.likely


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
        stop_distributed()
        return str(told.value)

    layout = Layout(context=2, precision="fp32")
    assert all("layout.context = 2: where another model's attention is" in line for line in run_ranks(2, refused))


@pytest.mark.parametrize(
    ("settings", "reason", "nearest"),
    [
        ({"context": 5}, "data.sequence = 24", "layout.context = 4, or data.sequence = 20"),
        ({"context": 2, "tensor": 4}, "data.sequence = 24", "data.sequence = 16"),
        ({"context": 3, "context_form": "all-to-all"}, "does not divide the 4 heads", '"ring"'),
        ({"context": 2, "shard": 3}, "layout.replica x layout.shard = 3", "2 ranks"),
        ({"context_form": "all-to-all"}, "nothing is split along the context axis", "layout.context = 2"),
    ],
    ids=str,
)
def test_what_cannot_be_split_is_refused(tmp_path: Path, settings: dict[str, Any], reason: str, nearest: str) -> None:
    with pytest.raises(SettingError) as told:
        tiny_job(tmp_path, processes=16, model={"feed_forward": 92}, layout=settings)
    assert reason in str(told.value) and nearest in str(told.value)
