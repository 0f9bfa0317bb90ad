"""Training, whole, on one page.

Every layout runs this same loop: what differs between one process and a thousand is inside `parallel`.
"""

import torch

from meshwright.data import Batches
from meshwright.parallel import (
    begin_microbatch,
    build_mesh,
    build_parallel_model,
    clip_gradients,
    data_rank,
    reduce_step,
    squared_norm,
)
from meshwright.record import RunFolder
from meshwright.spec import Job
from meshwright.trace import MemoryProbe, Recorder
from meshwright.train.evaluate import evaluate
from meshwright.train.optimizer import build_optimizer, learning_rate
from meshwright.train.reporter import Reporter
from meshwright.train.setup import StopRequest, build_loss, open_data, restore, save


def train(job: Job, folder: RunFolder, attempt: int, device: torch.device, stop: StopRequest, *, began_s: float) -> str:
    """Run a job's steps on this rank, from its newest checkpoint if there is one; return "finished" or "stopped".

    Called on every rank, after start_distributed. A stop asked for on any rank stops all of them after the same
    step, with a checkpoint.
    """
    mesh = build_mesh(job.layout, device)
    memory = MemoryProbe(device)
    stream = open_data(job)
    model = build_parallel_model(job, mesh, device)
    optimizer = build_optimizer(model, job.optimizer)
    first = restore(folder, model, optimizer)
    loss_of = build_loss(device)

    layout = job.layout
    accumulation = layout.accumulation(job.data.global_batch)
    tokens = job.data.global_batch * job.data.sequence
    batches = Batches(
        stream,
        data_rank=data_rank(mesh),
        data_size=layout.data_size,
        microbatch=layout.microbatch,
        accumulation=accumulation,
        device=device,
    )
    recorder = Recorder(folder, attempt, job, device, began_s=began_s)
    reporter = Reporter(folder, attempt, job, device, first)
    with recorder.span("evaluation", first):
        reporter.evaluated(first, evaluate(model, stream, job, mesh, device))

    how = "finished"
    for step in range(first, job.run.steps):
        watched = step == first + 1  # the second step: every buffer is there, and nothing is compiled any more
        with recorder.step(step):
            reporter.begin_step()
            with recorder.phase("input"):
                microbatches = batches.next(step)
            loss = torch.zeros((), device=device)
            for index, (inputs, targets) in enumerate(microbatches):
                with recorder.phase("forward"), memory.forward(model, layout, active=watched and index == 0) as seen:
                    begin_microbatch(model, layout, last=index == accumulation - 1)
                    logits = seen(model(inputs))
                    part = loss_of(logits, targets) / tokens
                with recorder.phase("backward"):
                    del logits
                    part.backward()
                    loss += part.detach()
            with recorder.phase("optimizer"):
                squared = squared_norm(model)
                with recorder.phase("control"):
                    totals = reduce_step(loss, squared, stop=stop.asked)
                clip_gradients(model, totals.gradient_norm, job.optimizer.clip_norm)
                rate = learning_rate(step, job.run.steps, job.optimizer)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                if watched:
                    memory.states(model, optimizer)
                optimizer.zero_grad(set_to_none=True)
        stopping = reporter.end_step(step, totals, rate)

        done = step + 1
        last = done == job.run.steps or stopping
        if watched:
            recorder.memory(step, memory)
        if last or due(done, job.evaluation.every_steps):
            with recorder.span("evaluation", done):
                reporter.evaluated(done, evaluate(model, stream, job, mesh, device))
        if last or due(done, job.checkpoint.every_steps):
            with recorder.span("checkpoint", done):
                save(folder, done, model, optimizer, job, recorder, final=last)
        if stopping:
            how = "stopped"
            break
    batches.close()
    reporter.close(how)
    recorder.close(how)
    return how


def due(done: int, every: int) -> bool:
    """Whether something that happens every so many steps happens now; 0 is never."""
    return every > 0 and done % every == 0
