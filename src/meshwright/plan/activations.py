"""Bytes that a rank keeps from the forward to the backward pass, by recompute policy, and the loss's tensors."""

import msgspec

from meshwright.plan.kept import (
    BYTES,
    is_compiled,
    keep_block,
    keep_load,
    local_sequence,
    loss_of,
    tokens_of,
    widths_of,
)
from meshwright.plan.kernels import has_kernels, keep_kernels, norm_bytes, passing_bytes, residual_width
from meshwright.plan.part import Cut, Group, Kind, Part, Stage
from meshwright.spec import SPLIT_BACKWARD, Job, Moment


class Activations(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of one stage. kept: of each microbatch between its passes. put_off: of each between the two halves of a
    backward pass that is cut in two. again: by how much they are more (or less, where blocks after it are done) while
    its last recomputed block runs again, or once all that is put off is there; -inf where neither comes. room: what one
    block works in, where it keeps its input alone and so do all others of the stage."""

    kept: float
    again: float
    put_off: float = 0.0
    room: float = 0.0


# Activations of stages that were looked at, where all else is alike.
Seen = dict[Kind, Activations]


def stage_activations(job: Job, cut: Cut, stage: Stage) -> Activations:
    """What a stage keeps of one microbatch, and what it needs beside while a block runs again."""
    layout, tokens = job.layout, tokens_of(job)
    size, split = BYTES[layout.precision], residual_width(job, cut)
    kernels = has_kernels(job)
    if layout.recompute == "selective":
        kernels = job.trainer.selective == "all-but-scores"
    keep = keep_kernels if kernels else keep_block
    # Attention adds a mask in numbers to its scores, and each block keeps its own; a GPU's skips tiles by a short list.
    mask = 0 if job.cluster.device.is_accelerator else mask_elements(job)
    recomputed = stage.first(layout.recomputed_layers(job.model.layers))
    kept, done, again, first_again, room, start = 0.0, 0.0, float("-inf"), 0.0, 0.0, 0
    for count, group in stage.runs(cut):
        dense = group is cut.first and cut.dense > 0
        whole = keep(job, cut, dense=dense, selective=False) + size * mask
        if not start and (recomputed or layout.recompute == "selective"):
            first_again = whole
        if layout.recompute == "selective":
            part = keep(job, cut, dense=dense, selective=True)
            kept, again, start = kept + count * part, max(again, whole - part), start + count
            continue
        inputs = min(max(0, recomputed - start), count)
        kept += inputs * (tokens * size * split + keep_load(cut, dense=dense)) + (count - inputs) * whole
        done = 0.0 if inputs else done
        again = whole if inputs else again
        room = max(room, whole) if inputs == count else 0.0
        done += (count - inputs) * whole
        start += count
    # With the first block's input stays what all blocks are given: the mask in booleans, a byte each.
    kept += mask if recomputed or layout.recompute == "selective" else 0
    if has_kernels(job):
        kept += tokens * around_bytes(job, cut, stage)
        again = max(again, done) + passing_bytes(job, cut)
    else:
        # A stage's output is there until its gradient comes back.
        kept += tokens * (outside_bytes(job, cut, stage) + (0.0 if stage.head else size * split))
    kept += tables_bytes(job)
    put_off = put_off_bytes(job, cut, stage)
    if not put_off:
        return Activations(kept=kept, again=again - done, room=room)
    # The first block's backward pass is the last one: while it runs again, the others' products are put off already.
    _, first = stage.runs(cut)[0]
    more = max(0.0, first_again - tokens * size * put_off_block(job, cut, first))
    return Activations(kept=kept, again=max(again - done, put_off - kept + more), put_off=put_off, room=room)


def put_off_bytes(job: Job, cut: Cut, stage: Stage) -> float:
    """What a microbatch's backward pass leaves for its second half: inputs of matrices and gradients of their outputs.

    0 where backward passes are not cut in two. What is recomputed makes no difference: all of it is there by then.
    """
    if job.layout.schedule not in SPLIT_BACKWARD:
        return 0.0
    elements = sum(count * put_off_block(job, cut, group) for count, group in stage.runs(cut))
    if stage.head:
        # The final norm's output, gathered, and the gradient of the logits.
        elements += job.model.d_model - (-job.model.vocabulary // cut.tensor)
    return tokens_of(job) * elements * BYTES[job.layout.precision]


def put_off_block(job: Job, cut: Cut, group: Group) -> float:
    """Numbers a token of one block.

    Inputs: the norms' outputs, gathered, 2D; attention's output HE; the product of gate and up F. Gradients: of queries
    HE, keys and values 2KE, gate and up 2F; of both parts' outputs, before ranks of the tensor axis divide them, 2D; in
    latent attention of what it goes down to as well. Routed experts' products are not put off.
    """
    model, w = cut.model, widths_of(job, cut)
    experts = None if group is cut.first and cut.dense else model.experts
    f = (experts.shared * experts.feed_forward if experts else model.feed_forward) / cut.tensor
    attention = 2 * w.whole + w.mixed + w.query + w.made + 2 * w.low_rank
    return attention + (2 * w.whole + (3 if model.parts.gated else 2) * f if f else 0)


def mask_elements(job: Job) -> int:
    """Of the table of what each token sees of the others; 0 where it sees all of the past, or a ring goes by tiles."""
    square = job.data.sequence**2
    if job.layout.context > 1 and job.layout.context_form == "ring":
        return 0
    if job.data.attention == "document":
        return job.layout.microbatch * square
    return square if 0 < job.model.attention_window < job.data.sequence else 0


def activation_bytes(job: Job, part: Part) -> float:
    """A rank's tensors between forward and backward passes at their peak, with one microbatch in each stage."""
    stages = len(part.stages)
    return peak_bytes(job, part, (Moment(kept=(1,) * stages, put_off=(0,) * stages),))[0]


def peak_bytes(job: Job, part: Part, alive: tuple[Moment, ...], seen: Seen | None = None) -> tuple[float, float, float]:
    """Activations and logits of a rank at their peak, or while a block runs again, if that is more; and the hole
    between them, which neither fills.

    alive: microbatches of each stage between their passes, at each moment that could be the fullest. While a
    recomputed block of the last stage runs again, the blocks after it and the loss are done and their tensors gone.
    seen: of stages that were looked at before; others are added.
    """
    seen, again = {} if seen is None else seen, job.layout.recomputed_layers(job.model.layers)
    each: list[Activations] = []
    for stage in part.stages:
        kind = stage.kind(part.cut, again)
        if kind not in seen:
            seen[kind] = stage_activations(job, part.cut, stage)
        each.append(seen[kind])
    has_head = any(stage.head for stage in part.stages)
    waiting = waiting_logits_bytes(job) if has_head else 0.0

    def at(moment: Moment) -> tuple[float, float]:
        kept, due = 0.0, 0
        for between, put_off, stage, activations in zip(*moment, part.stages, each, strict=True):
            kept += between * activations.kept + put_off * activations.put_off
            due += between if stage.head else 0
        # The loss's tensors are whole for one microbatch; of others that are due, what its backward pass needs.
        return kept, max(0, due - 1) * waiting

    kept, others = max(map(at, alive), key=sum)
    logits = logits_bytes(job) if has_head else 0.0
    # The room that each block works in is free when the logits come, which lie behind what was kept meanwhile. Blocks
    # that keep more than their input fill it, and so do logits that are few.
    room = min(stage.room for stage in each)
    hole = room if room < logits else 0.0
    return kept + max(0.0, max(stage.again for stage in each) - logits), logits + others, hole


def outside_bytes(job: Job, cut: Cut, stage: Stage) -> float:
    """Bytes a token beside the blocks.

    The embedding keeps its int64 tokens (its output is the first block's input, counted there); the final norm its
    input and a root (LayerNorm a mean as well), in eager code on a CPU also its input scaled; the head the norm's
    output, gathered.
    """
    rms = job.model.parts.norm == "rms"
    split = job.model.d_model / cut.tensor
    tokens = 8 if stage.root else 0
    if not stage.head:
        return tokens
    norms = split + (split if rms and not is_compiled(job) else 0) + job.model.d_model
    return tokens + norms * BYTES[job.layout.precision] + (4 if rms else 8) / cut.tensor


def around_bytes(job: Job, cut: Cut, stage: Stage) -> float:
    """The same of a program that brings its own kernels: which numbers of the embedding were dropped, and the final
    norm, whose output the head keeps; or what the stage has sent on, where that is not freed."""
    sent = 0 if stage.head or not job.trainer.keeps_sent else BYTES[job.layout.precision] * residual_width(job, cut)
    kept = sent + (8.0 + (residual_width(job, cut) if job.trainer.dropout else 0.0) if stage.root else 0.0)
    return kept + (norm_bytes(job, cut) if stage.head else 0.0)


def tables_bytes(job: Job) -> float:
    """cos and sin in fp32, or int64 positions, once for all blocks; for all sequences too, unless each counts from its
    own documents' starts."""
    places = local_sequence(job) * (job.layout.microbatch if job.data.attention == "document" else 1)
    if job.model.parts.positions == "learned":
        return 8.0 * places
    rotated = job.model.latent.rope_head_dim if job.model.latent else job.model.head_dim
    return 2 * places * rotated // 2 * 4.0


def logits_bytes(job: Job) -> float:
    """The loss's tensors of vocabulary width at their peak.

    Plain: in the backward pass through fp32 cross entropy, the saved log-probabilities, the gradient with respect to
    them, and the gradient with respect to the fp32 logits that is computed from both. (The forward pass holds less:
    logits, their fp32 copy, log-probabilities.)
    Compiled: the logits and their gradient, both in the compute precision; no fp32 copy is ever whole in memory. On
    an H200 the allocated peak of benchmarks/training_gpu.py less everything else leaves 3.8 bytes a logit.
    In place: the logits and their fp32 copy, or the copy turned into the gradient and that in compute precision.
    """
    size = BYTES[job.layout.precision]
    # Logits that ranks gather are there as they are sent, and as they came, beside what the loss makes of them.
    gathered = (size if job.layout.tensor == 1 else 2 * size) if job.trainer.whole_logits else 0
    return (
        vocabulary_elements(job)
        * {
            "plain": 3 * 4.0 + gathered,
            "compiled": 2.0 * size,
            "in-place": size + 4.0,
        }[loss_of(job)]
    )


def vocabulary_elements(job: Job) -> int:
    """Logits of a microbatch. The first ranks of a vocabulary that does not divide have a row more."""
    ranks = 1 if job.trainer.whole_logits else job.layout.tensor
    return tokens_of(job) * -(-job.model.vocabulary // ranks)


def waiting_logits_bytes(job: Job) -> float:
    """What the loss keeps of a microbatch whose backward pass is to come: logits, or probabilities in fp32."""
    return vocabulary_elements(job) * (BYTES[job.layout.precision] if loss_of(job) == "compiled" else 4.0)
