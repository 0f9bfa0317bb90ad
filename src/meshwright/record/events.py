"""What a run folder's lines say, as types. One line is one event; `event` names its type in the JSON."""

import msgspec

from meshwright.account import MeasuredStep, MemoryAccount, StepAccount
from meshwright.record.detail import StepDetail
from meshwright.spec import Layout


class Metrics(msgspec.Struct, frozen=True, kw_only=True):
    """One training step of the whole job: a line of metrics.jsonl. Steps are counted from 0.

    loss: mean over the global batch's tokens, nats; None where it was not a finite number (JSON has no such thing),
    so that a run that diverged still has its lines; the gradient norm likewise. mfu: model FLOPs utilisation, 0 to 1;
    None where no peak is known. memory_bytes: rank 0's peak (on CPU its resident set). Of a mixture, else None:
    expert_load, tokens of the fullest expert over its layer's mean, in the layer where that is largest; balance_loss,
    what it adds to the loss that is minimised, which `loss` leaves out. Of another trainer's program also None: what it
    does not tell its recorder.
    """

    step: int
    attempt: int
    time_s: float
    loss: float | None
    gradient_norm: float | None
    learning_rate: float | None
    step_s: float
    tokens_per_s: float | None
    mfu: float | None
    memory_bytes: float | None
    expert_load: float | None = None
    balance_loss: float | None = None


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """Held-out loss after `step` steps, nats per token (None: not finite): a line of metrics.jsonl beside the steps.

    bigram_entropy: of the corpus, nats per token; a model that falls below it uses more than one token of context.
    """

    step: int
    attempt: int
    time_s: float
    held_out_loss: float | None
    bigram_entropy: float | None = None


class Span(msgspec.Struct, frozen=True, kw_only=True, tag="span", tag_field="event"):
    """A stretch of a rank's life that the run account has a word for.

    `name`: startup, compile, evaluation, checkpoint, measurement or step (many steps may share one line: `count`
    steps, of which `step` is the last).
    """

    name: str
    start_s: float
    end_s: float
    step: int = 0
    count: int = 1


class Step(msgspec.Struct, frozen=True, kw_only=True, tag="step", tag_field="event"):
    """A profiled step as this rank measured it, with what its trace tells beyond the account."""

    measured: MeasuredStep
    detail: StepDetail | None = None


class Memory(msgspec.Struct, frozen=True, kw_only=True, tag="memory", tag_field="event"):
    """This rank's memory account at the peak of `step`."""

    step: int
    account: MemoryAccount


class Fault(msgspec.Struct, frozen=True, kw_only=True, tag="fault", tag_field="event"):
    """Something went wrong on this rank; `what` is one line."""

    step: int
    time_s: float
    what: str


class Ended(msgspec.Struct, frozen=True, kw_only=True, tag="ended", tag_field="event"):
    """The rank left the attempt in good order; `how`: finished or stopped."""

    step: int
    time_s: float
    how: str


Event = Span | Step | Memory | Fault | Ended


class PlannedPass(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One pass of a microbatch through a stage (F, B, or a backward pass in two: I and W), as predicted."""

    kind: str
    stage: int
    microbatch: int
    begin_s: float
    end_s: float


class PlannedPipeline(msgspec.Struct, frozen=True, kw_only=True):
    """A pipeline's stages and the passes of each rank, in seconds from the step's begin.

    stage_layers, stage_ranks: blocks of each stage, and the rank that holds it. left_out: microbatches of the middle of
    the step that are not drawn, each like those before it.
    """

    schedule: str
    stage_layers: tuple[int, ...]
    stage_ranks: tuple[int, ...]
    left_out: int
    ranks: tuple[tuple[PlannedPass, ...], ...]


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """A layout with its predicted accounts, as plan.json holds it. Times per step, memory of the fullest rank.

    step_interval_s, memory_interval_bytes: from and to, what 8 of 10 measurements are meant to lie in.
    Along pipeline the step is the mean over ranks. pipeline: what each of them runs when, where it is drawn.
    """

    layout: Layout
    step: StepAccount
    overlapped: dict[str, float] = {}
    memory: MemoryAccount
    step_s: float
    step_interval_s: tuple[float, float] = (0.0, 0.0)
    memory_interval_bytes: tuple[float, float] = (0.0, 0.0)
    tokens_per_s: float
    notes: tuple[str, ...] = ()
    pipeline: PlannedPipeline | None = None
