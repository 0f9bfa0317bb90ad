"""The expert axis: a mixture's experts divided over ranks, and tokens sent to them and back.

The axis reuses the ranks of shard x context x tensor. Along it each rank holds whole experts; over the ranks that it
leaves, FSDP splits each expert's matrices, and over replica it sums their gradients. Tokens come as the tensor and
context axes have split them, so no rank routes what another does.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.profiler import record_function

from meshwright.models import Experts, Mixture
from meshwright.models.experts import Gather, Sent, Spread
from meshwright.parallel.mesh import build_expert_mesh, own_group
from meshwright.parallel.shard import build_offload, build_policy, sum_gradients
from meshwright.parallel.tensor import place
from meshwright.record.kineto import PREFIX, ROWS
from meshwright.spec import Layout, expert_dim


class AllToAll:
    """Rows sent to the ranks that hold their experts, in splits as uneven as the routing: nothing is dropped."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._ranks = group.size()

    def hold(self, matrices: Tensor) -> Tensor:
        """This rank's experts. Their gradients are whole: every row of theirs comes here."""
        assert isinstance(matrices, DTensor)
        return matrices.to_local()

    def send(self, rows: Tensor, counts: Tensor) -> Sent:
        """rows: [N*C, D] sorted by expert; counts: [X]. Ranks hold experts in order, so rows are sorted by rank too."""
        if self._ranks == 1:
            return Sent(rows, counts, lambda made: made)
        here = len(counts) // self._ranks
        arriving = exchange(counts, None, None, self._group).unflatten(0, (self._ranks, here))  # by sender and expert
        # The one wait for the device: how many rows go where must be known to launch anything of their size.
        given, taken = torch.stack((counts.unflatten(0, (-1, here)).sum(1), arriving.sum(1))).tolist()
        with record_function(f"{ROWS}{sum(taken)}"):
            came = Transfer.apply(rows, given, taken, self._group)
        experts = torch.arange(here, device=rows.device).repeat(self._ranks)
        order = experts.repeat_interleave(arriving.flatten(), output_size=sum(taken)).argsort(stable=True)
        back = partial(self._send_back, order, given, taken)
        return Sent(Spread.apply(came, order, 1), arriving.sum(0), back)  # pyright: ignore[reportArgumentType]

    def _send_back(self, order: Tensor, given: list[int], taken: list[int], made: Tensor) -> Tensor:
        return Transfer.apply(Gather.apply(made, order), taken, given, self._group)  # pyright: ignore[reportReturnType]


class Transfer(torch.autograd.Function):
    """One all-to-all; its gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, given: list[int], taken: list[int], group: dist.ProcessGroup) -> Tensor:
        """rows: [sum(given), D], rank by rank. Returns [sum(taken), D]."""
        ctx.given, ctx.taken, ctx.group = given, taken, group
        return exchange(rows, taken, given, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """Back to where they came from."""
        return exchange(gradients[0].contiguous(), ctx.given, ctx.taken, ctx.group), None, None, None


def exchange(rows: Tensor, taken: list[int] | None, given: list[int] | None, group: dist.ProcessGroup) -> Tensor:
    """All to all along dim 0. As an operator with a result, which selective recompute can keep."""
    with record_function(PREFIX + "expert"):
        return functional.wait_tensor(functional.all_to_all_single(rows, taken, given, group))


def mixtures_of(model: nn.Module) -> list[Mixture]:
    """The model's mixtures, first to last."""
    return [module for module in model.modules() if isinstance(module, Mixture)]


def experts_of(model: nn.Module) -> list[Experts]:
    """The routed experts of each mixture, first to last."""
    return [mixture.experts for mixture in mixtures_of(model)]


class ExpertAxis(NamedTuple):
    """What experts are divided over: their mesh, the group that tokens are sent among, and the axes that share a
    sequence; and the sequences of the global batch, over which the balance loss is a mean."""

    mesh: DeviceMesh
    group: dist.ProcessGroup
    sequence_axes: Mapping[str, DeviceMesh]
    sequences: int


def build_expert_axis(layout: Layout, mesh: DeviceMesh, sequences: int) -> ExpertAxis:
    """Called once and by every rank, those without a mixture too: process groups are made together."""
    expert_mesh = build_expert_mesh(layout, mesh)
    group = own_group(expert_mesh["expert"], "expert")
    return ExpertAxis(expert_mesh, group, {name: mesh[name] for name in ("context", "tensor")}, sequences)


def apply_expert(model: nn.Module, axis: ExpertAxis) -> None:
    """Divide the mixtures' experts along the expert axis in place."""
    for experts in experts_of(model):
        for name, stack in list(experts.named_parameters(recurse=False)):
            experts.register_parameter(name, place(stack, Shard(0), axis.mesh["expert"]))
        experts.exchange = AllToAll(axis.group)
        experts.sequences = axis.sequences
        experts.whole_sequence = partial(sum_sequence, axis.sequence_axes)


def sum_sequence(axes: Mapping[str, DeviceMesh], counts: Tensor) -> Tensor:
    """Counts of this rank's part of each sequence, summed over the ranks that have the other parts."""
    for name, axis in axes.items():
        if axis.size() > 1:
            with record_function(f"{PREFIX}{name}"):
                counts = functional.wait_tensor(functional.all_reduce(counts, "sum", axis.get_group()))
    return counts


def shard_experts(model: nn.Module, layout: Layout, axis: ExpertAxis) -> None:
    """Split each expert's matrices over the ranks that the expert axis leaves: a group of transfers for each mixture.

    Along the matrices' rows, or their columns where ranks do not divide the rows: of experts there may be fewer than
    ranks.
    """

    def split(matrices: nn.Parameter) -> Shard:
        return Shard(expert_dim(matrices.shape[1], layout.expert_shard))

    plane = axis.mesh["expert_shard"] if layout.replica == 1 else axis.mesh["replica", "expert_shard"]
    policy: MixedPrecisionPolicy = build_policy(layout)
    for experts in experts_of(model):
        fully_shard(
            experts,
            mesh=plane,
            mp_policy=policy,
            offload_policy=build_offload(layout),
            reshard_after_forward=layout.zero == 3,
            shard_placement_fn=split,
        )
        assert isinstance(experts, FSDPModule)
        if plane.size() > 1:
            sum_gradients(experts)
