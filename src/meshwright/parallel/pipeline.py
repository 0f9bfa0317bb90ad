"""The pipeline axis: a rank's stages of the model, and its passes over them in the order of the layout's schedule.

One stage on one rank is a schedule too: forward and backward by turns, and no messages. That is how a layout without
the axis trains.

Schedules are tables (spec/schedule.py), the planner's and the report's too. They are not run by torch's runtime for
pipelines, which gives wrong gradients where parameters are freed after a forward pass and backward passes are cut in
two, and which reduces gradients once a step whatever `zero` says.
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.profiler import record_function

from meshwright.models import Decoder, View
from meshwright.parallel.context import LocalBatch, Samples, cut_sequence
from meshwright.parallel.later import Later, Product
from meshwright.parallel.part import local
from meshwright.parallel.shard import COMPUTE_DTYPE, begin_microbatch, free_gathered, reduce_gradients
from meshwright.record.kineto import message_label
from meshwright.spec import (
    Action,
    Direction,
    Job,
    Layout,
    Message,
    ModelSpec,
    build_schedule,
    forward_only,
    message_from,
    order_messages,
    stage_count,
)


class Pipe(NamedTuple):
    """A rank's place along pipeline, and what passes through it.

    ranks: of the world, along pipeline. shape, dtype: of a microbatch's state between stages, as this rank holds it.
    """

    ranks: tuple[int, ...]
    rank: int
    group: dist.ProcessGroup
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def build_pipe(job: Job, mesh: DeviceMesh, device: torch.device) -> Pipe:
    """This rank's. States lie split over the sequence, along context and along tensor."""
    along, layout = mesh["pipeline"], job.layout
    return Pipe(
        ranks=tuple(along.mesh.tolist()),
        rank=along.get_local_rank(),
        group=along.get_group(),
        shape=(layout.microbatch, job.data.sequence // (layout.context * layout.tensor), job.model.d_model),
        dtype=COMPUTE_DTYPE[layout.precision],
        device=device,
    )


class Stages(nn.Module):
    """The stages that a rank holds, their parameters under the whole model's names.

    parts: the stages by number; each is sharded by itself. later: each one's products that backward passes put off.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layout: Layout,
        mesh: DeviceMesh,
        pipe: Pipe,
        parts: Mapping[int, Decoder],
        later: Mapping[int, Later],
    ) -> None:
        super().__init__()
        self.spec, self.layout, self.mesh, self.pipe = spec, layout, mesh, pipe
        # Plain dicts, which torch does not look into: the stages' modules are registered under their own names.
        self.parts, self.later = dict(parts), dict(later)
        self.blocks = nn.ModuleDict()
        for part in parts.values():
            self.blocks.update(dict(part.blocks.items()))
            for name, module in part.named_children():
                if name != "blocks":
                    self.register_module(name, module)
        # Worked out once for each number of microbatches.
        self.schedule = cache(lambda microbatches: build_schedule(layout, microbatches))
        self.messages = cache(lambda microbatches: order_messages(layout, self.schedule(microbatches)))
        # The same of a forward pass alone.
        self.forward_schedule = forward_only(layout)
        self.forward_messages = order_messages(layout, self.forward_schedule)

    @property
    def last(self) -> int:
        """The whole model's last stage, which makes the logits."""
        return stage_count(self.layout) - 1

    def cut(self, batch: Samples) -> LocalBatch:
        """What this rank works on of some samples."""
        return cut_sequence(batch, self.spec, self.layout, self.mesh)

    def forward(self, tokens: Tensor, view: View) -> Tensor | None:
        """The logits of a batch as large as a microbatch, [B, S, V], on the rank that has the last stage; on others
        None. All ranks along pipeline call it together. tokens: [B, S]."""
        mail = Mail(self.pipe, self.forward_messages)
        made = tokens
        for action in self.forward_schedule[self.pipe.rank]:
            given = tokens if action.stage == 0 else mail.take("forward", action)
            made = self.parts[action.stage](given, view)
            if message := message_from(self.layout, action):
                mail.put(message, made)
        mail.close()
        return made if self.last in self.parts else None

    def free(self) -> None:
        """Free what forward passes without backward passes left gathered."""
        for part in self.parts.values():
            free_gathered(part)

    def tied_copy(self) -> nn.Parameter | None:
        """The last stage's copy of a tied embedding's weight, if this rank has that stage and it is not the first."""
        part = self.parts.get(self.last)
        return part.head.weight if part is not None and part.head is not None and self.spec.tied_embeddings else None

    def tied_weights(self) -> list[nn.Parameter]:
        """What this rank holds of a tied embedding that lies in two stages: its weight, its copy, or both."""
        first, copy = self.parts.get(0), self.tied_copy()
        in_two = self.spec.tied_embeddings and self.last > 0
        embedding = first.get_parameter("embedding.weight") if in_two and first is not None else None
        return [weight for weight in (embedding, copy) if weight is not None]


class Passes:
    """One step's passes of a rank over its microbatches.

    actions: in the order in which they must be run.
    """

    def __init__(self, model: Stages, microbatches: int) -> None:
        self._model = model
        self.actions = model.schedule(microbatches)[model.pipe.rank]
        self._mail = Mail(model.pipe, model.messages(microbatches))
        # What went into a stage and what came out of it, until the backward pass; then products that this has put off.
        self._kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._put_off: dict[tuple[int, int], list[Product]] = {}
        # The pass after which a stage's gradients are whole.
        self._ends = {action.stage: action for action in self.actions if action.kind in ("B", "W")}

    def forward(self, action: Action, tokens: Tensor, view: View) -> Tensor:
        """A stage's forward pass. Returns the state that it makes [B, S, D], or the last stage's logits."""
        given = tokens if action.stage == 0 else self._mail.take("forward", action).requires_grad_()
        self._kept[action.stage, action.microbatch] = given, given
        return self._model.parts[action.stage](given, view)

    def keep(self, action: Action, made: Tensor) -> None:
        """Keep what the forward pass ended in, the loss in the last stage, for the backward pass; send states on."""
        given, _ = self._kept[action.stage, action.microbatch]
        self._kept[action.stage, action.microbatch] = given, made
        if message := message_from(self._model.layout, action):
            self._mail.put(message, made)

    def backward(self, action: Action) -> None:
        """A stage's backward pass, or one half of it."""
        model, key = self._model, (action.stage, action.microbatch)
        part, later = model.parts[action.stage], model.later.get(action.stage)
        last = self._ends[action.stage] == action
        if action.kind != "W":
            given, made = self._kept.pop(key)
            gradient = None if action.stage == model.last else self._mail.take("backward", action)
            begin_microbatch(part, model.layout, last=last and later is None)
            torch.autograd.backward(made, gradient)
            if message := message_from(model.layout, action):
                assert given.grad is not None
                self._mail.put(message, given.grad)
        if later is not None:
            if action.kind != "W":
                self._put_off[key] = later.take()
            if action.kind != "I":
                for product in self._put_off.pop(key):
                    product.add()
            if last:
                reduce_gradients(part)

    def put_off(self, action: Action) -> Sequence[Product]:
        """The products that a backward pass has put off and that are still due."""
        return self._put_off.get((action.stage, action.microbatch), ())

    def close(self) -> None:
        """Wait until what was sent has left, and give both copies of a tied embedding the sum of their gradients."""
        self._mail.close()
        sum_tied(self._model)


class Mail:
    """States on their way between ranks, all ranks' sends and receives in one order.

    So they can share a stream on a GPU, where one waits for those before it. Receives are posted as early as that
    allows, ahead of the passes that need them: with gpipe a step's gradients all at once. Each takes a state's memory,
    little beside what a stage keeps of the microbatch meanwhile; held back, it would take the sender's instead.
    """

    def __init__(self, pipe: Pipe, messages: Sequence[Message]) -> None:
        self._pipe = pipe
        self._next = deque(message for message in messages if pipe.rank in (message.source, message.target))
        self._arrived: dict[tuple[Direction, int, int], Tensor] = {}
        self._coming: dict[tuple[Direction, int, int], tuple[Message, dist.Work]] = {}
        self._leaving: deque[tuple[dist.Work, Tensor]] = deque()
        # A message's number among those between the same two ranks in the same direction, equal on both.
        count: Counter[tuple[int, int]] = Counter()
        self._numbers: dict[Message, int] = {}
        for message in self._next:
            self._numbers[message] = count[message.source, message.target]
            count[message.source, message.target] += 1
        self._post_receives()

    def put(self, message: Message, state: Tensor) -> None:
        """Send a state, or lay it down for another stage of this rank."""
        state = state.detach().contiguous()
        if message.source == message.target:
            self._arrived[message[:3]] = state
            return
        assert self._next.popleft() == message
        with self._labelled("send", message):
            work = start(dist.isend, state, self._pipe, message.target)
        self._leaving.append((work, state))
        while self._leaving and self._leaving[0][0].is_completed():
            self._leaving.popleft()[0].wait()
        self._post_receives()

    def take(self, direction: Direction, action: Action) -> Tensor:
        """What a pass needs from another stage: the input of a forward pass, the output's gradient of a backward."""
        key = (direction, action.stage, action.microbatch)
        if key in self._coming:
            message, work = self._coming.pop(key)
            with self._labelled("take", message):
                work.wait()
        return self._arrived.pop(key)

    def close(self) -> None:
        """Wait until everything has left."""
        while self._leaving:
            self._leaving.popleft()[0].wait()

    def _labelled(self, what: str, message: Message) -> AbstractContextManager[Any]:
        source, target = (self._pipe.ranks[rank] for rank in (message.source, message.target))
        return record_function(message_label(what, source, target, self._numbers[message]))

    def _post_receives(self) -> None:
        pipe = self._pipe
        while self._next and self._next[0].target == pipe.rank:
            message = self._next.popleft()
            state = torch.empty(pipe.shape, dtype=pipe.dtype, device=pipe.device)
            with self._labelled("receive", message):
                work = start(dist.irecv, state, pipe, message.source)
            self._arrived[message[:3]] = state
            self._coming[message[:3]] = message, work


def start(operation: Callable[..., Any], state: Tensor, pipe: Pipe, other: int) -> dist.Work:
    """Begin to send a state to another rank along pipeline, or to receive it."""
    # A batch of one: by itself NCCL would set up a communicator for the two ranks, or warn that it cannot.
    (work,) = dist.batch_isend_irecv([dist.P2POp(operation, state, pipe.ranks[other], pipe.group)])
    return work


@torch.no_grad()
def sum_tied(model: Stages) -> None:
    """Give an embedding and its copy in the last stage, on one rank or two, the sum of their gradients.

    Both are split over the same ranks in the same way, so each rank's part meets its like.
    """
    gradients = [local_gradient(weight) for weight in model.tied_weights()]
    if len(gradients) == 2:
        gradients[0] += gradients[1]
        gradients[1].copy_(gradients[0])
    elif gradients:
        pipe = model.pipe
        other = pipe.ranks[0 if model.tied_copy() is not None else -1]
        ours = gradients[0].to(pipe.device)
        theirs = torch.empty_like(ours)
        sends = dist.P2POp(dist.isend, ours, other, pipe.group)
        receives = dist.P2POp(dist.irecv, theirs, other, pipe.group)
        # Numbered apart from the passes' messages.
        with record_function(message_label("take", other, dist.get_rank(), -1)):
            for work in dist.batch_isend_irecv([sends, receives]):
                work.wait()
        gradients[0] += theirs.to(gradients[0].device)


def local_gradient(weight: nn.Parameter) -> Tensor:
    """This rank's part of a parameter's gradient, which there must be."""
    assert weight.grad is not None
    return local(weight.grad)
