"""A mixture of experts in place of the feed-forward part: who computes a token, with what weight, and the products.

Shapes: B batch, S sequence, D model, X experts, F an expert's feed-forward width, C experts per token, N tokens.
Nothing is dropped: every token comes to all of its experts, however many they get.

Routing is Mixtral's (arXiv:2401.04088), Qwen3's (arXiv:2505.09388) or DeepSeek-V3's (arXiv:2412.19437, section 2.1.2),
and a test holds the logits of each to transformers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.spec import ModelSpec

# Of DeepSeek's own code: keeps weights defined where all chosen scores are 0.
TINY = 1e-20
# Bytes that a row's length must be a multiple of for CUDA's grouped products.
ALIGNED_BYTES = 16


class Choice(NamedTuple):
    """A router's decision: experts [B, S, C] int64, their weights [B, S, C], and what balance is judged by: each
    expert's share [B, S, X] of a token's scores. Weights and shares are fp32."""

    experts: Tensor
    weights: Tensor
    shares: Tensor


class Sent(NamedTuple):
    """Rows [M, D] where their experts are, sorted by expert; how many each expert has; and the way back, which takes
    what was made of them and gives it in the order in which rows were sent."""

    rows: Tensor
    counts: Tensor
    back: Callable[[Tensor], Tensor]


class Exchange(Protocol):
    """Brings rows to their experts. In one process they stay; `parallel` has the one that sends them to other ranks."""

    def hold(self, matrices: Tensor) -> Tensor:
        """The experts' matrices that are here, as a plain tensor."""
        ...

    def send(self, rows: Tensor, counts: Tensor) -> Sent:
        """Send rows [N*C, D], sorted by expert, of which expert x has counts[x]."""
        ...


class Stay:
    """All experts are here."""

    def hold(self, matrices: Tensor) -> Tensor:
        """All of them."""
        return matrices

    def send(self, rows: Tensor, counts: Tensor) -> Sent:
        """Nothing moves."""
        return Sent(rows, counts, lambda made: made)


class Load:
    """What a step's backward passes have seen of a mixture: tokens of each expert [X], and the balance loss."""

    def __init__(self) -> None:
        self._counts: Tensor | None = None
        self._balance: Tensor | None = None

    def add(self, counts: Tensor, balance: Tensor) -> None:
        """Add a microbatch's counts [X] and its balance loss []."""
        self._counts = counts if self._counts is None else self._counts + counts
        self._balance = balance if self._balance is None else self._balance + balance

    def take(self, like: Tensor) -> Tensor:
        """The step's balance loss and counts as one fp32 tensor [1 + X] on `like`'s device; begins anew.

        Exact for up to 2^24 tokens an expert, beyond that rounded in the eighth digit.
        """
        counts, balance = self._counts, self._balance
        self._counts = self._balance = None
        if counts is None or balance is None:
            return torch.zeros(1 + like.shape[0], device=like.device)
        return torch.cat((balance.float()[None], counts.float()))


class Router(nn.Module):
    """Scores of each expert, before they are made probabilities."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.experts is not None
        self.weight = nn.Parameter(torch.empty(spec.experts.count, spec.d_model))
        # Decides who is chosen, not with what weight. No gradient moves it: after each step it goes against the load.
        bias = torch.empty(spec.experts.count) if spec.selection_bias else None
        self.bias: Tensor | None
        self.register_buffer("bias", bias)
        # As transformers computes them, so that the same token is the closest call to both.
        self._wide = spec.parts.scores == "sigmoid"
        # The weight as a plain tensor.
        self.hold: Callable[[Tensor], Tensor] = lambda weight: weight

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] to [B, S, X]."""
        weight = self.hold(self.weight)
        return F.linear(x.float(), weight.float()) if self._wide else F.linear(x, weight)


class Experts(nn.Module):
    """The routed experts: chosen, counted, computed where they are, and added up."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.experts is not None
        count, width, d_model = spec.experts.count, spec.experts.feed_forward, spec.d_model
        self.gate = nn.Parameter(torch.empty(count, width, d_model))
        self.up = nn.Parameter(torch.empty(count, width, d_model))
        self.down = nn.Parameter(torch.empty(count, d_model, width))
        self.settings = spec.experts
        self.sigmoid = spec.parts.scores == "sigmoid"
        self.load = Load()
        self.exchange: Exchange = Stay()
        # Of the global batch, whose mean the balance loss is; None: as many as in this forward pass.
        self.sequences: int | None = None
        # Counts [B, X] of a rank's part of each sequence to the whole sequence's.
        self.whole_sequence: Callable[[Tensor], Tensor] = lambda counts: counts

    def forward(self, x: Tensor, logits: Tensor, bias: Tensor | None) -> Tensor:
        """x: [B, S, D]; logits: [B, S, X]; bias: [X], added to scores in choosing. Returns [B, S, D]."""
        choice = self.choose(logits, bias)
        weights, counts = self.watch(choice)
        order = choice.experts.flatten().argsort(stable=True)  # [N*C], by expert, tokens of one in their order
        copies = self.settings.per_token
        sent = self.exchange.send(Spread.apply(x.flatten(0, 1), order, copies), counts.sum(0))
        matrices = (self.exchange.hold(stack) for stack in (self.gate, self.up, self.down))
        made = grouped_feed_forward(sent.rows, sent.counts, *matrices)
        return Combine.apply(sent.back(made), order, weights.to(x.dtype))  # pyright: ignore[reportReturnType]

    def choose(self, logits: Tensor, bias: Tensor | None) -> Choice:
        """Which experts a token uses, and with what weights."""
        settings = self.settings
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scores = wide.sigmoid() if self.sigmoid else wide.softmax(-1)
        ranked = scores.detach() if bias is None else scores.detach() + bias
        if settings.groups > 1:
            ranked = keep_best_groups(ranked, settings.groups, settings.groups_per_token)
        chosen = ranked.topk(settings.per_token, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if settings.normalised:
            weights = weights / (weights.sum(-1, keepdim=True) + TINY)
        shares = scores / (scores.sum(-1, keepdim=True) + TINY) if self.sigmoid else scores
        return Choice(experts=chosen, weights=weights * settings.scale, shares=shares)

    def watch(self, choice: Choice) -> tuple[Tensor, Tensor]:
        """The choice's weights, on whose way back counts and balance are taken; and the counts [B, X]."""
        chosen = choice.experts.flatten(1)  # [B, S*C]
        counts = chosen.new_zeros(chosen.shape[0], choice.shares.shape[-1])
        counts = counts.scatter_add(1, chosen, torch.ones_like(chosen))
        balance = choice.shares.new_zeros(())
        if self.settings.balance_loss:
            whole, sequences = self.whole_sequence(counts), self.sequences or len(counts)
            even = imbalance(choice.shares, whole, self.settings.per_token)
            balance = self.settings.balance_loss * even.sum() / sequences
        return Watch.apply(choice.weights, balance, counts.sum(0), self.load), counts  # pyright: ignore[reportReturnType]


class Mixture(nn.Module):
    """Router, experts, and the experts that every token uses, which are one plain feed-forward part.

    The block that has it calls each of them: what routing decides cannot be compiled with the rest.
    """

    def __init__(self, spec: ModelSpec, layer: int, shared: nn.Module | None) -> None:
        super().__init__()
        self.layer = layer
        self.router = Router(spec)
        self.experts = Experts(spec)
        self.shared = shared


def keep_best_groups(ranked: Tensor, groups: int, kept: int) -> Tensor:
    """Scores [..., X] with those of all but `kept` of `groups` equal groups put below every other.

    A group is judged by its two best experts, as DeepSeek-V3 does.
    """
    by_group = ranked.unflatten(-1, (groups, -1))
    best = by_group.topk(min(2, by_group.shape[-1]), dim=-1).values.sum(-1)  # [..., groups]
    inside = torch.zeros_like(best, dtype=torch.bool).scatter(-1, best.topk(kept, dim=-1).indices, True)
    return by_group.masked_fill(~inside[..., None], -torch.inf).flatten(-2)


def imbalance(shares: Tensor, counts: Tensor, per_token: int) -> Tensor:
    """Each sequence's sum over experts of f x P [B], as arXiv:2412.19437 has it: 1 where all are used alike.

    shares: [B, S, X], of a rank's part of the sequence, which gives that part of P; counts: [B, X], of the whole.
    """
    tokens = counts.sum(-1, keepdim=True) / per_token  # [B, 1]
    frequency = counts * counts.shape[-1] / (per_token * tokens)  # f: its mean over experts is 1
    return (frequency * shares.sum(1) / tokens).sum(-1)


class Watch(torch.autograd.Function):
    """Weights as they are. On the way back the balance loss begins its own gradient, and the load is counted.

    Counted there because a backward pass runs once for each microbatch, where a forward pass may run again for
    recompute, or alone in an evaluation.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, balance: Tensor, counts: Tensor, load: Load) -> Tensor:
        """weights: of any shape; balance: []; counts: [X]."""
        ctx.balance, ctx.counts, ctx.load = balance.detach(), counts, load
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """The balance loss is a part of the loss, so its gradient is 1."""
        ctx.load.add(ctx.counts, ctx.balance)
        return gradients[0], torch.ones_like(ctx.balance), None, None


class Spread(torch.autograd.Function):
    """Tokens [N, D] to one row for each of their `copies` experts, in `order`; gradients add up in a fixed order.

    torch's own indexing adds them up in whatever order a GPU's threads arrive.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, copies: int) -> Tensor:
        """order: [N*copies], a permutation of each token's copies. Returns [N*copies, D]."""
        ctx.save_for_backward(order)
        ctx.copies = copies
        return tokens.index_select(0, order // copies if copies > 1 else order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Back by token."""
        (order,) = ctx.saved_tensors
        by_token = put_back(gradients[0], order)
        return by_token.unflatten(0, (-1, ctx.copies)).sum(1) if ctx.copies > 1 else by_token, None, None


class Gather(torch.autograd.Function):
    """Rows back in the order that they had before `order` was taken of them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor) -> Tensor:
        """rows: [M, D]; order: [M], a permutation."""
        ctx.save_for_backward(order)
        return put_back(rows, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """In the order again."""
        (order,) = ctx.saved_tensors
        return gradients[0].index_select(0, order), None


class Combine(torch.autograd.Function):
    """Each token's rows back from `order`, added up with their weights: a small product a token, in one order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
        """rows: [N*C, D]; order: [N*C]; weights: [B, S, C]. Returns [B, S, D]."""
        by_token = put_back(rows, order).unflatten(0, (-1, weights.shape[-1]))  # [N, C, D]
        ctx.save_for_backward(by_token, order, weights)
        mixed = rows.new_empty(*weights.shape[:-1], rows.shape[-1])
        torch.bmm(weights.flatten(0, 1).unsqueeze(1), by_token, out=mixed.view(-1, 1, rows.shape[-1]))
        return mixed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor]:
        """Of rows, in order again, and of weights."""
        by_token, order, weights = ctx.saved_tensors
        gradient = gradients[0].flatten(0, 1)  # [N, D]
        of_weights = torch.bmm(by_token, gradient.unsqueeze(2)).view_as(weights)
        copies = order // weights.shape[-1]
        of_rows = gradient.index_select(0, copies) * weights.flatten().index_select(0, order).unsqueeze(1)
        return of_rows, None, of_weights


def put_back(rows: Tensor, order: Tensor) -> Tensor:
    """What rows[order] was taken of."""
    return torch.empty_like(rows).index_copy_(0, order, rows)


def grouped_feed_forward(rows: Tensor, counts: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU of each expert for its own rows.

    rows: [M, D] sorted by expert; counts: [X]; gate, up: [X, F, D]; down: [X, D, F]. Returns [M, D].
    """
    if rows.is_cuda and rows.dtype == torch.bfloat16 and len(rows) and is_aligned(gate) and is_aligned(down):
        ends = counts.cumsum(0).to(torch.int32)
        hidden = F.silu(grouped_product(rows, gate, ends)) * grouped_product(rows, up, ends)
        return grouped_product(hidden, down, ends)
    parts = rows.split(counts.tolist())
    # Taken apart by unbind: its gradient is one stack, where indexing would make a whole one for each expert.
    each = zip(parts, gate.unbind(), up.unbind(), down.unbind(), strict=True)
    return torch.cat([F.linear(F.silu(F.linear(part, g)) * F.linear(part, u), d) for part, g, u, d in each])


def grouped_product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """rows [M, I] times each expert's matrix [X, O, I], transposed; ends: [X] int32, the row after each one's last."""
    return F.grouped_mm(rows, matrices.transpose(-2, -1), offs=ends)


def is_aligned(matrices: Tensor) -> bool:
    """Whether rows of these matrices begin where the grouped product's loads want them."""
    return matrices.shape[-1] * matrices.element_size() % ALIGNED_BYTES == 0
