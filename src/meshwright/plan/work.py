"""What one rank computes, copies and sends in a microbatch, piece by piece, in seconds."""

import msgspec

from meshwright.plan.activations import BYTES
from meshwright.plan.collective import Ring, build_ring, predict_collective
from meshwright.plan.compute import Passes, block_passes, head_passes
from meshwright.plan.memory import STATE_BYTES
from meshwright.plan.part import Part
from meshwright.plan.rates import rates_of
from meshwright.plan.tensor import TensorTransfers, block_transfers, end_transfers
from meshwright.spec import Job


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """One FSDP group with what runs while it is whole: the embedding (root), a block, or the head.

    Seconds for one microbatch. count: pieces in a row that are alike. again_s: forward work done again before the
    backward pass. tensor_*_s: exposed transfers along the tensor axis in each of the three, and hidden ones of all
    three. copy_out_s: making the group whole in compute precision, once. copy_in_s: turning its gradients into a
    reduction's input. accumulate_s: adding whole gradients to those kept for a later reduction. gather_s, scatter_s,
    all_reduce_s: its transfers, once.
    """

    count: int = 1
    forward_s: float
    backward_s: float
    again_s: float = 0.0
    tensor_forward_s: float = 0.0
    tensor_backward_s: float = 0.0
    tensor_again_s: float = 0.0
    tensor_hidden_s: float = 0.0
    copy_out_s: float
    copy_in_s: float
    accumulate_s: float
    gather_s: float
    scatter_s: float
    all_reduce_s: float


def build_pieces(job: Job, part: Part) -> list[Piece]:
    """The model's pieces in the order of the forward pass; needs known peaks."""
    groups, layers = part.groups, job.model.layers
    rings = (build_ring(job.layout, "shard", job.cluster), build_ring(job.layout, "replica", job.cluster))
    passes, (embedding, logits) = block_passes(job, part), end_transfers(job, part)
    transfers = block_transfers(job, part, (passes.reads_s, passes.reduces_s))
    block = build_piece(job, groups.block, passes, rings, transfers)
    if job.layout.recompute == "selective":
        block = recompute_elementwise(job, block, passes)
    first = job.layout.recomputed_layers(layers)
    blocks = [recompute_block(job, msgspec.structs.replace(block, count=first), passes, transfers)] if first else []
    blocks += [msgspec.structs.replace(block, count=layers - first)] if first < layers else []
    root = build_piece(job, groups.root, Passes(), rings, embedding)
    head = build_piece(job, groups.head, head_passes(job), rings, logits)
    return [root, *blocks, head]


def recompute_block(job: Job, piece: Piece, passes: Passes, transfers: TensorTransfers) -> Piece:
    """A block whose forward pass runs again, its transfers along the tensor axis too.

    On a CPU, not compiled, it stops where all is there that the backward pass needs: before the last product.
    """
    eager = job.cluster.device.kind == "cpu"
    return msgspec.structs.replace(
        piece,
        again_s=piece.forward_s - (passes.last_s if eager else 0.0),
        tensor_again_s=piece.tensor_forward_s - (transfers.last_s if eager else 0.0),
        # Hidden in the forward pass, in its second run and in the backward pass, alike.
        tensor_hidden_s=1.5 * piece.tensor_hidden_s,
    )


def recompute_elementwise(job: Job, piece: Piece, passes: Passes) -> Piece:
    """A block whose element-wise work runs again: on a GPU, compiled, inside the backward pass's fused kernels."""
    if job.cluster.device.kind == "cuda":
        return msgspec.structs.replace(piece, backward_s=piece.backward_s + passes.elementwise_s)
    return msgspec.structs.replace(piece, again_s=passes.elementwise_s)


def build_piece(
    job: Job, parameters: float, passes: Passes, rings: tuple[Ring, Ring], transfers: TensorTransfers
) -> Piece:
    """A group of `parameters` elements with its copies and transfers."""
    shard, replica = rings
    rates = rates_of(job.cluster.device)
    size, memory_bytes_per_s = BYTES[job.layout.precision], job.cluster.device.memory_bytes_per_s
    # A gather arrives in compute precision; one process casts its fp32 masters instead.
    read = size if shard.size > 1 else STATE_BYTES
    # Reductions are fp32. FSDP runs the copy into the reduction's input without other ranks too.
    return Piece(
        forward_s=passes.forward_s,
        backward_s=passes.backward_s,
        tensor_forward_s=transfers.forward_s,
        tensor_backward_s=transfers.backward_s,
        tensor_hidden_s=transfers.hidden_s,
        copy_out_s=parameters * (read + size) / (memory_bytes_per_s * rates.copy_out),
        copy_in_s=parameters * (size + STATE_BYTES) / (memory_bytes_per_s * rates.copy_in),
        # Reads the new gradient and the fp32 sum, writes the sum: a plain pass, as fast as a copy.
        accumulate_s=parameters * (size + 2 * STATE_BYTES) / (memory_bytes_per_s * rates.copy_out),
        gather_s=predict_collective("all_gather", parameters * size, shard, rates) if parameters else 0.0,
        scatter_s=predict_collective("reduce_scatter", parameters * STATE_BYTES, shard, rates) if parameters else 0.0,
        all_reduce_s=predict_collective("all_reduce", parameters * STATE_BYTES / shard.size, replica, rates)
        if parameters
        else 0.0,
    )
