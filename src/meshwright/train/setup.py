"""What surrounds the loop: data, restoring, saving, and the wish to stop."""

import signal
import sys
from types import FrameType

import torch
from torch.distributed.device_mesh import DeviceMesh

from meshwright.checkpoint import CheckpointError, load_checkpoint, load_pretrained, save_checkpoint
from meshwright.data import Batches, Samples, Stream, open_stream
from meshwright.parallel import PartOptimizer, Stages, data_rank, tell_all
from meshwright.record import RunFolder
from meshwright.spec import Job, SettingError
from meshwright.trace import Recorder


class StopRequest:
    """Whether this rank was asked to stop. The first signal asks, a second one ends the process at once."""

    def __init__(self) -> None:
        self.asked = False

    def listen(self) -> None:
        """Take over SIGINT. SIGTERM keeps ending the process at once: the launcher ends peers of a crashed rank so."""
        signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.asked = True


def open_data(job: Job) -> Stream:
    """The job's stream, whose tokens are prepared before ranks join. Every rank must have found the same."""
    stream = open_stream(job)
    if tell_all(lambda: stream.checksum) != stream.checksum:
        setting, source = job.data.named_sources()[0]
        raise SettingError(f'{setting} = "{source.path}"', "holds other text here than on rank 0", "the same files")
    return stream


def build_batches(stream: Samples, job: Job, mesh: DeviceMesh, device: torch.device) -> Batches:
    """This rank's share of each step's global batch."""
    layout = job.layout
    return Batches(
        stream,
        data_rank=data_rank(mesh),
        data_size=layout.data_size,
        microbatch=layout.microbatch,
        accumulation=layout.accumulation(job.data.global_batch),
        device=device,
    )


def restore(folder: RunFolder, model: Stages, optimizer: PartOptimizer, stream: Stream) -> int:
    """Fill model and optimizer from the run's newest checkpoint and return its step.

    If there is none: 0, and the model starts from the weights in model.path, or stays as it was built.
    """
    saved = folder.saved_steps()
    if saved:
        return load_checkpoint(folder.checkpoint(saved[-1]), model, optimizer, stream.checksum)
    if model.spec.path:
        load_pretrained(model, model.spec)
    return 0


def save(
    folder: RunFolder,
    step: int,
    model: Stages,
    optimizer: PartOptimizer,
    stream: Stream,
    job: Job,
    recorder: Recorder,
    *,
    final: bool,
) -> None:
    """Save a checkpoint. One that fails on the way is reported and training goes on: the next save may find room,
    and nothing trained so far is lost meanwhile. The last one must not fail."""
    try:
        save_checkpoint(folder, step, model, optimizer, job.layout, corpus=stream.checksum, keep=job.checkpoint.keep)
    except CheckpointError as error:
        recorder.fault(step, str(error))
        if final:
            resume = f"free space there, then meshwright train --resume {folder.path}"
            raise SettingError("checkpoint", str(error), resume) from None
        if recorder.rank == 0:
            print(f"warning: {error}; training goes on", file=sys.stderr, flush=True)


def due(done: int, every: int) -> bool:
    """Whether something that happens every so many steps happens now; 0 is never."""
    return every > 0 and done % every == 0
