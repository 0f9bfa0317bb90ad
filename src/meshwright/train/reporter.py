"""What the loop tells people while it runs: metrics.jsonl, and a progress display on rank 0."""

import time

import torch
import torch.distributed as dist

from meshwright.parallel import StepTotals
from meshwright.record import Evaluation, LineWriter, Metrics, RunFolder
from meshwright.spec import Job, count_flops
from meshwright.trace.memory import peak_memory_bytes
from meshwright.train.progress import Display, build_display


class Reporter:
    """Turns a step's totals into a line of metrics.

    On a GPU a step is read one step late, when its numbers have arrived anyway: reading them at once would make the
    host wait for the device in every step.
    """

    def __init__(self, folder: RunFolder, attempt: int, job: Job, device: torch.device, first: int) -> None:
        self._job = job
        self._attempt = attempt
        self._device = device
        self._tokens = job.data.global_batch * job.data.sequence
        peak = job.cluster.device.peak_flops_per_s(job.layout.precision) * job.layout.world_size
        flops = count_flops(job.model, job.data.sequence).training() * job.data.global_batch
        self._mfu_seconds = flops / peak if peak else None
        self._waiting: list[tuple[int, StepTotals, float, Moment, Moment]] = []
        self._began: Moment | None = None
        leads = dist.get_rank() == 0
        self._writer = LineWriter(folder.metrics) if leads else None
        self._display: Display | None = build_display(job, folder, first) if leads else None

    def begin_step(self) -> None:
        """Mark the step's start."""
        self._began = Moment(self._device)

    def end_step(self, step: int, totals: StepTotals, rate: float) -> bool:
        """Take a step's totals; return whether all ranks are to stop now."""
        assert self._began is not None
        on_gpu = self._device.type == "cuda"
        self._waiting.append((step, totals.to_host(), rate, self._began, Moment(self._device)))
        return self._report() if len(self._waiting) > on_gpu else False

    def _report(self) -> bool:
        step, totals, rate, began, ended = self._waiting.pop(0)
        step_s = ended.since(began)
        if self._writer is not None and self._display is not None:
            line = Metrics(
                step=step,
                attempt=self._attempt,
                time_s=time.time(),
                loss=float(totals.loss),
                gradient_norm=float(totals.gradient_norm),
                learning_rate=rate,
                step_s=step_s,
                tokens_per_s=self._tokens / step_s,
                mfu=self._mfu_seconds / step_s if self._mfu_seconds else None,
                memory_bytes=peak_memory_bytes(self._device),
                expert_load=totals.expert_load(),
                balance_loss=totals.balance_loss(),
            )
            self._writer.append(line)
            self._display.step(line)
        return float(totals.stop) > 0

    def evaluated(self, done: int, loss: float | None, bigram_entropy: float | None) -> None:
        """Write the held-out loss after `done` steps, and the corpus's bigram entropy to hold it against."""
        while self._waiting:
            self._report()
        if loss is not None and self._writer is not None and self._display is not None:
            line = Evaluation(
                step=done,
                attempt=self._attempt,
                time_s=time.time(),
                held_out_loss=loss,
                bigram_entropy=bigram_entropy,
            )
            self._writer.append(line)
            self._display.evaluated(line)

    def close(self, how: str) -> None:
        """Report what is left and end the display."""
        while self._waiting:
            self._report()
        if self._writer is not None and self._display is not None:
            self._writer.close()
            self._display.close(how)


class Moment:
    """A point in the device's work: an event on a GPU, the clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self._time = time.perf_counter()
        if self._event is not None:
            self._event.record()

    def since(self, earlier: "Moment") -> float:
        """Seconds from `earlier` to here; waits for the device to have come here."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) * 1e-3
