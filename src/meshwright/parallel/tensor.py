"""The tensor axis: matrices split over ranks, and between them activations split along the sequence.

A family's split table (spec/family.py) says in words how each module is split; here each word becomes placements of
parameters, inputs and outputs, and DTensor does the rest: what is gathered, what is summed, and which gradients are.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch._inductor.config
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from meshwright.models import NOT_COUNTED
from meshwright.models.experts import Router
from meshwright.spec import SettingError, Split, SplitTable, split_of

Loss = Callable[[Tensor, Tensor], Tensor]

WHOLE, SEQUENCE, HEADS, LAST, BEFORE_LAST = Replicate(), Shard(1), Shard(2), Shard(-1), Shard(-2)


class Rule(NamedTuple):
    """What a word does to a module.

    weight, bias: where its parameters go. given: what its first input is when it comes as a plain tensor; wanted:
    what that is made before the module runs. made: what its output is made, then handed on as a plain tensor; None
    leaves the output alone.
    """

    weight: Placement
    bias: Placement
    given: Placement
    wanted: Placement
    made: Placement | None


RULES: dict[Split, Rule] = {
    "vocabulary": Rule(weight=Shard(0), bias=WHOLE, given=WHOLE, wanted=WHOLE, made=SEQUENCE),
    # Positions may come without a batch: [S] gives [S, D].
    "positions": Rule(weight=WHOLE, bias=WHOLE, given=WHOLE, wanted=LAST, made=BEFORE_LAST),
    "sequence": Rule(weight=WHOLE, bias=WHOLE, given=SEQUENCE, wanted=SEQUENCE, made=SEQUENCE),
    # Handed on as a DTensor: gradients of the modules inside are summed once, on their way back through here.
    "gather": Rule(weight=WHOLE, bias=WHOLE, given=SEQUENCE, wanted=WHOLE, made=None),
    "column": Rule(weight=Shard(0), bias=Shard(0), given=WHOLE, wanted=WHOLE, made=LAST),
    "kv_heads": Rule(weight=Shard(0), bias=Shard(0), given=WHOLE, wanted=WHOLE, made=LAST),
    "heads": Rule(weight=WHOLE, bias=WHOLE, given=HEADS, wanted=HEADS, made=HEADS),
    "row": Rule(weight=Shard(1), bias=WHOLE, given=LAST, wanted=LAST, made=SEQUENCE),
    # Handed on as a DTensor, to the loss that knows what to do with it.
    "logits": Rule(weight=Shard(0), bias=Shard(0), given=SEQUENCE, wanted=WHOLE, made=None),
}
# Fewer heads than ranks: every rank computes all of them and keeps the ones that its queries look at.
SHARED_HEADS = Rule(weight=WHOLE, bias=WHOLE, given=WHOLE, wanted=WHOLE, made=WHOLE)


class Heads(NamedTuple):
    """A model's key heads: how many there are, and how wide one is."""

    kv_heads: int
    head_dim: int


def apply_tensor(model: nn.Module, table: SplitTable, mesh: DeviceMesh, heads: Heads | None) -> None:
    """Split `model`'s modules in place over a one-dimensional mesh, as `table` says; heads: for the word kv_heads."""
    for name, module in model.named_modules():
        word = split_of(table, name)
        # Experts take their part of the sequence as it is: parallel/expert.py sends it on.
        if word is None or word == "experts":
            continue
        if word == "router":
            assert isinstance(module, Router)
            module.weight = place(module.weight, WHOLE, mesh)
            module.hold = whole_weight
        elif word == "kv_heads" and heads is not None and heads.kv_heads < mesh.size():
            split_module(module, SHARED_HEADS, mesh)
            module.register_forward_hook(partial(keep_head, heads, mesh))
        else:
            split_module(module, RULES[word], mesh)


def split_module(module: nn.Module, rule: Rule, mesh: DeviceMesh) -> None:
    """Place a module's own parameters, and wrap its inputs and outputs."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        module.register_parameter(name, place(parameter, rule.bias if name == "bias" else rule.weight, mesh))
    module.register_forward_pre_hook(partial(take, rule, mesh), with_kwargs=True)
    if rule.made is not None:
        module.register_forward_hook(partial(give, rule, mesh))


def place(parameter: nn.Parameter, placement: Placement, mesh: DeviceMesh) -> nn.Parameter:
    """A parameter over a one-dimensional mesh."""
    # src_data_rank=None: nothing is sent, because the values come later, and every rank makes its own.
    split = distribute_tensor(parameter, mesh, [placement], src_data_rank=None)
    return nn.Parameter(split, requires_grad=parameter.requires_grad)


def whole_weight(weight: Tensor) -> Tensor:
    """A weight that is whole on each rank, as a plain tensor; what ranks make of it differs, so gradients are summed.

    Not left to DTensor: before torch 2.13 it refuses matrix products along a dim that is split behind the first.
    """
    assert isinstance(weight, DTensor)
    return weight.to_local(grad_placements=[Partial()])


def take(
    rule: Rule, mesh: DeviceMesh, _module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A module's inputs, the first of them, by position or by name, as the rule wants it."""
    if inputs:
        return (as_wanted(rule, mesh, inputs[0]), *inputs[1:]), named
    name, first = next(iter(named.items()))
    return (), {**named, name: as_wanted(rule, mesh, first)}


def as_wanted(rule: Rule, mesh: DeviceMesh, first: Tensor) -> DTensor:
    """An input as the rule wants it."""
    if not isinstance(first, DTensor):
        first = DTensor.from_local(first, mesh, [rule.given], run_check=False)
    if first.placements != (rule.wanted,):
        first = first.redistribute(placements=[rule.wanted])
    return first


def give(rule: Rule, mesh: DeviceMesh, _module: nn.Module, _inputs: tuple[Any, ...], output: DTensor) -> Tensor:
    """A module's output as the rule makes it."""
    assert rule.made is not None
    if rule.made == WHOLE:
        # What each rank makes of a whole output differs, so its gradients are parts of a sum.
        return output.to_local(grad_placements=[Partial()])
    sequence = output.shape[-2] if rule.made == BEFORE_LAST else output.shape[1]
    if rule.made in (SEQUENCE, BEFORE_LAST) and sequence % mesh.size():
        # From here on a rank's part is taken for as long as every other rank's.
        reason = f"does not divide the sequence, {sequence} long"
        raise SettingError(f"layout.tensor = {mesh.size()}", reason, "a padded sequence")
    if output.placements != (rule.made,):
        output = output.redistribute(placements=[rule.made])
    return output.to_local()


def keep_head(heads: Heads, mesh: DeviceMesh, _module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """Of all key or value heads [B, S, K*E] the one that this rank's query heads look at, [B, S, E]."""
    head = mesh.get_local_rank() * heads.kv_heads // mesh.size()
    return output.narrow(2, head * heads.head_dim, heads.head_dim)


def overlap_transfers() -> None:
    """Have torch.compile cut up the transfers around split matrix products and run the pieces beside one another.

    Set before blocks are compiled. Through symmetric memory, which GPUs of one host have by NVLink.
    """
    torch._inductor.config._micro_pipeline_tp = True


class Vocabulary(NamedTuple):
    """A rank's part of the vocabulary: the group that shares it, the part's first token, and whether to compile."""

    group: dist.ProcessGroup
    first: int
    compiled: bool


def build_vocabulary_loss(vocabulary: int, mesh: DeviceMesh, *, compiled: bool) -> Loss:
    """token_loss for logits that are split over a one-dimensional mesh: [B, S, this rank's tokens].

    Every rank of the mesh returns the whole loss; no rank ever holds the whole logits.
    """
    # As torch.chunk cuts, which is how DTensor splits what does not divide.
    rows = -(-vocabulary // mesh.size())
    return partial(_loss, Vocabulary(group=mesh.get_group(), first=mesh.get_local_rank() * rows, compiled=compiled))


def _loss(part: Vocabulary, logits: Tensor, targets: Tensor) -> Tensor:
    assert isinstance(logits, DTensor)
    return VocabularyLoss.apply(logits.to_local(), targets, part)  # pyright: ignore[reportReturnType]


class VocabularyLoss(torch.autograd.Function):
    """Cross entropy in fp32, whatever the logits' precision: two small all-reduces of [B, S] forward, none backward.

    Kept for the backward pass are the logits as they came; their softmax, in fp32 twice as large, is made again.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, part: Vocabulary) -> Tensor:
        """logits: [B, S, V/t]; targets: [B, S]. Returns the sum over counted targets."""
        largest = logits.detach().amax(-1).float()  # [B, S]
        dist.all_reduce(largest, dist.ReduceOp.MAX, part.group)
        terms = torch.compile(loss_terms) if part.compiled else loss_terms
        sums = terms(logits, targets, largest, part.first)  # [2, B, S]
        dist.all_reduce(sums, group=part.group)
        ctx.save_for_backward(logits, targets, largest + sums[0].log())
        ctx.part = part
        return torch.where(targets != NOT_COUNTED, largest + sums[0].log() - sums[1], 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of this rank's logits: its part of the softmax, less one at the targets it holds."""
        logits, targets, log_sums = ctx.saved_tensors
        of_logits = torch.compile(logit_gradients) if ctx.part.compiled else logit_gradients
        return of_logits(logits, targets, log_sums, ctx.part.first, gradients[0]), None, None


def loss_terms(logits: Tensor, targets: Tensor, largest: Tensor, first: int) -> Tensor:
    """This rank's part of the sum of exponentials and of the target's logit, [2, B, S]."""
    wide = logits.float()
    here = targets - first
    held = (here >= 0) & (here < logits.shape[-1])
    target = wide.gather(-1, here.clamp(0, logits.shape[-1] - 1)[..., None])[..., 0]
    return torch.stack([(wide - largest[..., None]).exp().sum(-1), torch.where(held, target, 0.0)])


def logit_gradients(logits: Tensor, targets: Tensor, log_sums: Tensor, first: int, gradient: Tensor) -> Tensor:
    """[B, S, V/t], in the logits' precision."""
    softmax = (logits.float() - log_sums[..., None]).exp()
    tokens = torch.arange(logits.shape[-1], device=logits.device) + first
    counted = (targets != NOT_COUNTED)[..., None]
    return torch.where(counted, (softmax - (tokens == targets[..., None]).float()) * gradient, 0.0).to(logits.dtype)
