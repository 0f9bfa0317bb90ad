"""What one rank computes, copies and sends in a microbatch, piece by piece, in seconds."""

from itertools import pairwise

import msgspec

from meshwright.plan.collective import (
    Ring,
    build_expert_rings,
    build_ring,
    build_shard_ring,
    predict_collective,
)
from meshwright.plan.compute import SCORE_PASSES, Passes, block_passes, head_passes
from meshwright.plan.context import context_transfers
from meshwright.plan.expert import exchange_seconds, uneven_seconds
from meshwright.plan.kept import BYTES, is_compiled
from meshwright.plan.part import STATE_BYTES, Cut, Group, Stage
from meshwright.plan.rates import rates_of
from meshwright.plan.tensor import TensorTransfers, block_transfers, end_transfers
from meshwright.spec import Job


class Moves(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of transfers inside one pass, by purpose, and of waiting for the busiest experts."""

    tensor_s: float = 0.0
    context_s: float = 0.0
    expert_s: float = 0.0
    uneven_s: float = 0.0

    def total(self) -> float:
        """All of them."""
        return self.tensor_s + self.context_s + self.expert_s + self.uneven_s


class Copies(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of what FSDP does with parameters, once.

    copy_out_s: making them whole in compute precision. copy_in_s: turning their gradients into a reduction's input.
    accumulate_s: adding whole gradients to those kept for a later reduction. gather_s, scatter_s, all_reduce_s: their
    transfers.
    """

    copy_out_s: float = 0.0
    copy_in_s: float = 0.0
    accumulate_s: float = 0.0
    gather_s: float = 0.0
    scatter_s: float = 0.0
    all_reduce_s: float = 0.0

    def __add__(self, other: "Copies") -> "Copies":
        # One by one: a search adds ten thousands of them.
        return Copies(
            copy_out_s=self.copy_out_s + other.copy_out_s,
            copy_in_s=self.copy_in_s + other.copy_in_s,
            accumulate_s=self.accumulate_s + other.accumulate_s,
            gather_s=self.gather_s + other.gather_s,
            scatter_s=self.scatter_s + other.scatter_s,
            all_reduce_s=self.all_reduce_s + other.all_reduce_s,
        )


# Of a piece without routed experts.
NONE = Copies()


class Does(msgspec.Struct, frozen=True, kw_only=True):
    """Which of these a pass does."""

    gathers: bool = False
    scatters: bool = False
    all_reduces: bool = False
    accumulates: bool = False

    def part_of(self, copies: Copies) -> Copies:
        """What of them is done. Reductions of either kind begin with the same copy."""
        reduces = self.scatters or self.all_reduces
        return Copies(
            copy_out_s=copies.copy_out_s if self.gathers else 0.0,
            copy_in_s=copies.copy_in_s if reduces else 0.0,
            accumulate_s=copies.accumulate_s if self.accumulates else 0.0,
            gather_s=copies.gather_s if self.gathers else 0.0,
            scatter_s=copies.scatter_s if self.scatters else 0.0,
            all_reduce_s=copies.all_reduce_s if self.all_reduces else 0.0,
        )


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """The embedding (root), a block, or the head, with what FSDP does around it.

    Seconds for one microbatch. count: pieces in a row that are alike. weights_s: of the backward pass, the gradients
    of matrices. again_s: forward work done again before the backward pass. forward, backward, again: exposed transfers
    inside each of the three; hidden: of all three. copies: of the piece's parameters but for routed experts, which are
    a group of their own.
    """

    count: int = 1
    forward_s: float = 0.0
    backward_s: float = 0.0
    weights_s: float = 0.0
    again_s: float = 0.0
    forward: Moves = Moves()
    backward: Moves = Moves()
    again: Moves = Moves()
    hidden: Moves = Moves()
    copies: Copies = NONE
    routed: Copies = NONE

    def copies_in_pass(self, plain: Does, routed: Does) -> Copies:
        """What one pass does of its copies, all together."""
        copies = plain.part_of(self.copies)
        return copies if self.routed is NONE else copies + routed.part_of(self.routed)

    def in_pass(self, plain: Does, routed: Does) -> "Piece":
        """The piece with what one pass does of its copies, all together."""
        return msgspec.structs.replace(self, copies=self.copies_in_pass(plain, routed), routed=NONE)


class Pieces(msgspec.Struct, frozen=True, kw_only=True):
    """The pieces that stages are put together from: embedding, each kind of block, kept or run again, and head."""

    root: Piece
    first: Piece
    first_again: Piece
    others: Piece
    others_again: Piece
    head: Piece


def build_pieces(job: Job, cut: Cut) -> Pieces:
    """Every kind of piece; needs known peaks."""
    embedding, logits = end_transfers(job, cut)
    others = build_block(job, cut, cut.others)
    first = build_block(job, cut, cut.first) if cut.dense else others
    return Pieces(
        root=build_piece(job, cut.root, Passes(), embedding),
        first=first[0],
        first_again=first[1],
        others=others[0],
        others_again=others[1],
        head=build_piece(job, cut.head, head_passes(job), logits),
    )


def stage_pieces(job: Job, cut: Cut, pieces: Pieces, stage: Stage) -> list[Piece]:
    """A stage's pieces in the order of its forward pass. Each has both ends, if only in name."""
    again = job.layout.recomputed_layers(job.model.layers)
    bounds = sorted({stage.start, stage.stop, *(n for n in (again, cut.dense) if stage.start < n < stage.stop)})
    order = [pieces.root if stage.root else EMPTY]
    for start, stop in pairwise(bounds):
        kept, run_again = (
            (pieces.first, pieces.first_again) if start < cut.dense else (pieces.others, pieces.others_again)
        )
        order.append(msgspec.structs.replace(run_again if start < again else kept, count=stop - start))
    return [*order, pieces.head if stage.head else EMPTY]


# What stands for either end in a stage that has not got it.
EMPTY = Piece()


def build_block(job: Job, cut: Cut, group: Group) -> tuple[Piece, Piece]:
    """A block, and one whose forward pass runs again."""
    passes = block_passes(job, cut, group)
    transfers = block_transfers(job, group, (passes.reads_s, passes.reduces_s))
    block = build_piece(job, group, passes, transfers)
    around = context_transfers(job, cut, passes)
    expert_s, uneven_s = (exchange_seconds(job), uneven_seconds(job, passes.routed_s)) if group.routed else (0.0, 0.0)
    replace = msgspec.structs.replace
    block = replace(
        block,
        forward=replace(block.forward, context_s=around[0][0], expert_s=expert_s, uneven_s=uneven_s),
        backward=replace(block.backward, context_s=around[1][0], expert_s=expert_s, uneven_s=2 * uneven_s),
        hidden=replace(block.hidden, context_s=around[0][1] + around[1][1]),
    )
    if job.layout.recompute == "selective":
        block = recompute_elementwise(job, block, passes)
    return block, recompute_block(job, block, passes, transfers, around[0][1])


def recompute_block(
    job: Job, piece: Piece, passes: Passes, transfers: TensorTransfers, context_hidden_s: float
) -> Piece:
    """A block whose forward pass runs again, with the transfers inside it.

    On a CPU, not compiled, it stops where all is there that the backward pass needs: before the last product.
    """
    eager = job.cluster.device.kind == "cpu"
    return msgspec.structs.replace(
        piece,
        again_s=piece.forward_s - (passes.last_s if eager else 0.0),
        again=msgspec.structs.replace(
            piece.forward, tensor_s=piece.forward.tensor_s - (transfers.last_s if eager else 0.0)
        ),
        # Hidden in the forward pass, in its second run and in the backward pass, along tensor alike.
        hidden=Moves(tensor_s=1.5 * piece.hidden.tensor_s, context_s=piece.hidden.context_s + context_hidden_s),
    )


def recompute_elementwise(job: Job, piece: Piece, passes: Passes) -> Piece:
    """A block of which the trainer's selective policy runs a part again.

    Element-wise work does so, compiled, inside the backward pass's fused kernels.
    """
    if job.trainer.selective == "all-but-scores":
        scores = job.trainer.attention in SCORE_PASSES
        return msgspec.structs.replace(piece, again_s=passes.attention_s if scores else 0.0)
    products_s = passes.reads_s + passes.reduces_s
    again_s = products_s / 2 if job.trainer.selective == "half-products" else 0.0
    if is_compiled(job):
        return msgspec.structs.replace(piece, backward_s=piece.backward_s + passes.elementwise_s, again_s=again_s)
    return msgspec.structs.replace(piece, again_s=passes.elementwise_s + again_s)


def build_piece(job: Job, group: Group, passes: Passes, transfers: TensorTransfers) -> Piece:
    """A group of parameters with its copies and transfers: routed experts are sharded as a group of their own."""
    routed = build_expert_rings(job.layout, job.cluster)[1] if group.routed else None
    return Piece(
        forward_s=passes.forward_s,
        backward_s=passes.backward_s,
        weights_s=passes.weights_s,
        forward=Moves(tensor_s=transfers.forward_s),
        backward=Moves(tensor_s=transfers.backward_s),
        hidden=Moves(tensor_s=transfers.hidden_s),
        copies=build_copies(
            job, group.elements - group.routed, build_shard_ring(job.layout, job.cluster, one_port=job.trainer.one_port)
        ),
        routed=build_copies(job, group.routed, routed) if routed else NONE,
    )


def build_copies(job: Job, parameters: int, shards: Ring) -> Copies:
    """What is done with a group of parameters, so many whole, that is sharded over a ring."""
    cluster, rates, size = job.cluster, rates_of(job.cluster), BYTES[job.layout.precision]
    sent = min(STATE_BYTES, job.trainer.gradient_bytes)
    memory_bytes_per_s, replica = cluster.device.memory_bytes_per_s, build_ring(job.layout, "replica", cluster)
    # A gather arrives in compute precision; a rank that has all of it casts its fp32 masters instead.
    read = size if shards.size > 1 else STATE_BYTES
    # Our reductions are fp32. FSDP runs the copy into the reduction's input without other ranks too.
    return Copies(
        copy_out_s=parameters * (read + size) / (memory_bytes_per_s * rates.copy_out),
        copy_in_s=parameters * (size + STATE_BYTES) / (memory_bytes_per_s * rates.copy_in),
        # Reads the new gradient and the fp32 sum, writes the sum: a plain pass, as fast as a copy.
        accumulate_s=parameters * (size + 2 * sent) / (memory_bytes_per_s * rates.copy_out),
        gather_s=predict_collective("all_gather", parameters * size, shards, rates) if parameters else 0.0,
        scatter_s=predict_collective("reduce_scatter", parameters * sent, shards, rates) if parameters else 0.0,
        all_reduce_s=(
            predict_collective("all_reduce", parameters * sent / shards.size, replica, rates) if parameters else 0.0
        ),
    )
