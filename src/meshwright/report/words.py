"""What the text and the page say alike: headlines, rows of the tables, one unit per table."""

from collections.abc import Sequence
from statistics import median
from typing import Literal

import msgspec

from meshwright.account import MEANINGS, Account, MemoryAccount, RunAccount, StepAccount
from meshwright.explain import Explanation
from meshwright.explain.program import program_mfu
from meshwright.explain.words import bytes_text, seconds_text
from meshwright.record import Metrics
from meshwright.report.text import plain
from meshwright.spec import count_parameters

MEMORY_MEANINGS = {
    "parameters": "this rank's part of the model",
    "gradients": "this rank's part of the gradients",
    "optimizer_states": "moments of the optimizer",
    "activations": "kept from forward to backward",
    "logits": "the output over the vocabulary",
    "communication_buffers": "gathered and reduced in flight",
    "framework": "context, libraries, process",
    "fragmentation": "reserved and not in use",
}
RUN_MEANINGS = {
    "useful": "model FLOPs at the device's peak rate",
    "rest of the steps": "the other buckets of the step account",
    "steps": "training steps (useful part not known)",
    "startup": "until the model is built and ready",
    "compile": "a compiler at work: torch.compile, XLA",
    "evaluation": "held-out loss",
    "checkpoint": "saves outside the steps",
    "measurement": "profiling, outside the steps it describes",
    "lost_work": "steps that a later attempt ran again",
    "detection": "a fault not yet noticed",
    "restart": "from a fault noticed to the next attempt",
    "idle": "paid, and none of the above",
}


# Less than this share of what was paid would print as 0.0%.
NEGLIGIBLE = 5e-4


class Row(msgspec.Struct, frozen=True):
    """A line of a table: predicted and measured in the table's unit, None where there is none."""

    name: str
    meaning: str
    predicted: float | None
    measured: float | None


class Unit(msgspec.Struct, frozen=True):
    """A unit that suits a whole table."""

    name: str
    size: float


def time_unit(seconds: float) -> Unit:
    """Milliseconds for steps below ten seconds."""
    return Unit("ms", 1e-3) if seconds < 10 else Unit("s", 1.0)


def memory_unit(size: float) -> Unit:
    """Megabytes below ten gigabytes."""
    return Unit("MB", 1e6) if size < 1e10 else Unit("GB", 1e9)


def step_rows(predicted: StepAccount | None, measured: StepAccount | None) -> list[Row]:
    """Seconds by bucket, zero rows left out.

    Without a datasheet peak nothing is useful and all of compute stands in `inefficiency`: the row then says compute.
    """
    rows = table_rows(predicted, measured, MEANINGS)
    if any(row.name == "useful" for row in rows):
        return rows
    renamed = ("compute", "forward and backward; no peak is known")
    return [Row(*renamed, r.predicted, r.measured) if r.name == "inefficiency" else r for r in rows]


def memory_rows(predicted: MemoryAccount | None, measured: MemoryAccount | None) -> list[Row]:
    """Bytes by part, zero rows left out."""
    return table_rows(predicted, measured, MEMORY_MEANINGS)


def table_rows(predicted: Account | None, measured: Account | None, meanings: dict[str, str]) -> list[Row]:
    """Rows that predicted or measured fill."""
    guesses = dict(predicted.rows()) if predicted is not None else {}
    values = dict(measured.rows()) if measured is not None else {}
    names = [name for name in meanings if guesses.get(name) or values.get(name)]
    return [Row(name, meanings[name], guesses.get(name), values.get(name)) for name in names]


def total(rows: Sequence[Row], side: Literal["predicted", "measured"]) -> float:
    """Sum of one side of a table."""
    return sum(getattr(row, side) or 0.0 for row in rows)


def run_rows(account: RunAccount) -> list[tuple[str, str, float]]:
    """(part, meaning, device-seconds) of the run account, the steps in two parts; rows that print as 0 left out."""
    useful, steps = account.steps.useful, account.steps.total()
    parts = [("useful", useful), ("rest of the steps", steps - useful)] if useful > 0 else [("steps", steps)]
    parts += [row for row in account.rows() if row[0] != "steps"]
    return [(name, RUN_MEANINGS[name], seconds) for name, seconds in parts if seconds > NEGLIGIBLE * account.total()]


def run_line(explanation: Explanation) -> str:
    """What the run was: layout, cluster, model, how it ended."""
    parts: list[str] = []
    prediction, job, program = explanation.prediction, explanation.job, explanation.program
    layout = prediction.layout if prediction is not None else (job.layout if job is not None else None)
    if layout is not None:
        parts.append(layout.label())
    if job is not None:
        parts += [plain(job.cluster.label()), f"{count_text(count_parameters(job.model))} parameters"]
    if program is not None:
        parts.append(plain(f"{program.trainer} on {explanation.world_size} x {program.device}"))
    if program is not None and program.parameters:
        parts.append(f"{count_text(program.parameters)} parameters")
    parts.append(explanation.ending)
    if explanation.attempts > 1:
        parts.append(f"attempt {explanation.attempt} of {explanation.attempts}, counted from 0")
    return " · ".join(parts)


def learned_line(explanation: Explanation) -> str:
    """Loss first to last and held-out before to after."""
    metrics = known_losses(explanation)
    if not explanation.metrics:
        return "no training step recorded yet"
    job, steps = explanation.job, explanation.metrics[-1].step + 1
    of = f" of {job.run.steps}" if job is not None and steps != job.run.steps else ""
    line = f"{steps}{of} steps"
    if metrics:
        line = f"loss {loss_text(metrics[0].loss)} -> {loss_text(metrics[-1].loss)} nats in {line}"
    if tokens := tokens_per_step(explanation):
        line += f", {count_text(steps * tokens)} tokens"
    held_out = explanation.evaluations
    if len(held_out) == 1:
        line += f"; held-out {loss_text(held_out[0].held_out_loss)}"
    elif held_out:
        line += f"; held-out {loss_text(held_out[0].held_out_loss)} -> {loss_text(held_out[-1].held_out_loss)}"
    entropy = bigram_entropy(explanation)
    return line if entropy is None else f"{line} (bigram entropy {loss_text(entropy)})"


def known_losses(explanation: Explanation) -> Sequence[Metrics]:
    """The lines whose loss is told; a job of ours tells it of every step, and "not finite" is an answer."""
    told = explanation.metrics
    return told if explanation.program is None else [line for line in told if line.loss is not None]


def tokens_per_step(explanation: Explanation) -> int | None:
    """Of all ranks; None where nobody told."""
    if explanation.job is not None:
        return explanation.job.data.global_batch * explanation.job.data.sequence
    return explanation.program.tokens_per_step if explanation.program is not None else None


def device_memory(explanation: Explanation) -> float | None:
    """Bytes that a device has; None where nobody told."""
    if explanation.job is not None:
        return explanation.job.cluster.device.memory_bytes
    return explanation.program.memory_bytes if explanation.program is not None else None


def bigram_entropy(explanation: Explanation) -> float | None:
    """What knowing one token back leaves uncertain in this corpus, nats per token, if it was counted."""
    return explanation.evaluations[-1].bigram_entropy if explanation.evaluations else None


def speed_line(explanation: Explanation) -> str:
    """Step time, measured beside predicted, tokens per second, utilisation and memory."""
    parts: list[str] = []
    prediction = explanation.prediction
    if explanation.step_s is not None:
        parts.append(f"{seconds_text(explanation.step_s)} a step (median of the steps not profiled)")
    if prediction is not None:
        parts.append(f"{seconds_text(prediction.step_s)} predicted")
    if explanation.step is not None:
        parts.append(f"{seconds_text(explanation.step.wall_s)} while profiled")
    if explanation.step_s and (tokens := tokens_per_step(explanation)):
        parts.append(f"{count_text(tokens / explanation.step_s)} tokens/s")
    mfu = typical_mfu(explanation)
    if mfu is not None:
        parts.append(f"MFU {mfu:.1%}")
    return ", ".join(parts) or "no step time recorded yet"


def typical_mfu(explanation: Explanation) -> float | None:
    """The median step's model FLOPs utilisation, where a peak is known."""
    known = [line.mfu for line in explanation.metrics if line.mfu is not None]
    return median(known) if known else program_mfu(explanation.program, explanation.step_s)


def yield_line(explanation: Explanation) -> str:
    """The yield, or why there is none, and the statistical efficiency beside it."""
    life = explanation.life
    paid = life.account.total()
    if life.yield_ is not None:
        text = f"{life.yield_:.1%}: useful device-seconds over {seconds_text(paid)} paid"
    elif paid > 0:
        text = f"not measurable: no datasheet peak says which of the {seconds_text(paid)} paid were useful"
    else:
        text = "not measurable: nothing recorded yet"
    return f"{text}. Statistical efficiency: {life.statistical_efficiency}"


def memory_line(explanation: Explanation) -> str:
    """The fullest rank's peak, measured and predicted."""
    memory = explanation.memory
    parts = [f"{bytes_text(memory.measured.total())} on rank {memory.rank}"] if memory.measured is not None else []
    if memory.predicted is not None:
        parts.append(f"{bytes_text(memory.predicted.total())} predicted")
    return ", ".join(parts) or "not measured"


def loss_text(loss: float | None) -> str:
    """A loss with four figures, or the plain truth."""
    return f"{loss:.3f}" if loss is not None else "not finite"


def count_text(count: float) -> str:
    """A count with a short suffix: 1.24 M."""
    for unit, suffix in ((1e12, " T"), (1e9, " B"), (1e6, " M")):
        if count >= unit:
            return f"{count / unit:,.3g}{suffix}"
    return f"{count:,.0f}"
