"""Training, whole, on one page: the loop of every layout. What differs between one process and a thousand is inside
`parallel`.
"""

import torch
from torch import Tensor

from meshwright.data import StepBatches
from meshwright.parallel import (
    Loss,
    PartOptimizer,
    Passes,
    Stages,
    StepTotals,
    build_loss,
    build_mesh,
    build_parallel_model,
    clip_gradients,
    move_biases,
    reduce_step,
    squared_norm,
    take_loads,
)
from meshwright.record import RunFolder
from meshwright.spec import Job
from meshwright.trace import MemoryProbe, Recorder
from meshwright.train.evaluate import evaluate
from meshwright.train.optimizer import build_optimizer, set_learning_rate
from meshwright.train.reporter import Reporter
from meshwright.train.setup import StopRequest, build_batches, due, open_data, restore, save


def train(job: Job, folder: RunFolder, attempt: int, device: torch.device, stop: StopRequest, *, began_s: float) -> str:
    """Run a job's steps on this rank, from its newest checkpoint if there is one; return "finished" or "stopped".

    Called on every rank, after start_distributed. A stop asked of any rank stops all after one step, with a checkpoint.
    """
    mesh = build_mesh(job.layout, device)
    memory = MemoryProbe(device)
    stream = open_data(job)
    model = build_parallel_model(job, mesh, device)
    optimizer = build_optimizer(model, job.optimizer, job.layout.offload)
    first = restore(folder, model, optimizer, stream)
    loss_of = build_loss(job, mesh, device)
    batches = build_batches(stream, job, mesh, device)
    recorder = Recorder(folder, attempt, job, device, began_s=began_s)
    reporter = Reporter(folder, attempt, job, device, first)
    with recorder.span("evaluation", first):
        reporter.evaluated(first, evaluate(model, loss_of, stream, job, mesh, device), stream.bigram_entropy)
    how = "finished"
    for step in range(first, job.run.steps):
        # Memory is watched in the second step: every buffer is there by then, and nothing is compiled any more.
        memory.active = step == first + 1
        with recorder.step(step):
            reporter.begin_step()
            with recorder.phase("input"):
                share = batches.next(step)
            loss = forward_backward(model, share, loss_of, recorder, memory)
            rate = set_learning_rate(optimizer, step, job)
            totals = update(model, optimizer, loss, job, recorder, memory, stop=stop.asked)
        stopping = reporter.end_step(step, totals, rate)
        done = step + 1
        last = done == job.run.steps or stopping
        if memory.active:
            recorder.memory(step, memory.account())
        if last or due(done, job.evaluation.every_steps):
            with recorder.span("evaluation", done):
                reporter.evaluated(done, evaluate(model, loss_of, stream, job, mesh, device), stream.bigram_entropy)
        if stopping or (last and job.checkpoint.at_end) or due(done, job.checkpoint.every_steps):
            with recorder.span("checkpoint", done):
                save(folder, done, model, optimizer, stream, job, recorder, final=last)
        if stopping:
            how = "stopped" if done < job.run.steps else "finished"
            break
    batches.close()
    reporter.close(how)
    recorder.close(how)
    return how


def forward_backward(
    model: Stages, share: StepBatches, loss_of: Loss, recorder: Recorder, memory: MemoryProbe
) -> Tensor:
    """Run the schedule's passes over this rank's microbatches; return its part of the global batch's mean loss."""
    passes = Passes(model, len(share.microbatches))
    loss = torch.zeros((), device=share.microbatches[0].tokens.device)
    for action in passes.actions:
        if action.kind == "F":
            with recorder.phase("forward"), memory.forward(model, action) as seen:
                held = model.cut(share.microbatches[action.microbatch])
                made = seen(passes.forward(action, held.tokens, held.view))
                if action.stage == model.last:
                    made = loss_of(made, held.targets) / share.counted
                    loss += made.detach()
                passes.keep(action, made)
        else:
            with recorder.phase("backward"):
                passes.backward(action)
            memory.backward(action, passes.put_off(action))
    passes.close()
    memory.passed(passes.actions)
    return loss


def update(
    model: Stages, optimizer: PartOptimizer, loss: Tensor, job: Job, recorder: Recorder, memory: MemoryProbe, stop: bool
) -> StepTotals:
    """Clip by the whole gradient's norm and step the optimizer; return the step's totals."""
    with recorder.phase("optimizer"):
        squared = squared_norm(model, but=model.tied_copy())
        with recorder.phase("control"):
            totals = reduce_step(loss, squared, job.layout, stop=stop, loads=take_loads(model))
        clip_gradients(model, totals.gradient_norm, job.optimizer.clip_norm)
        optimizer.step()
        move_biases(model, totals)
        memory.states(model, optimizer)
        optimizer.free_gradients()
    return totals
