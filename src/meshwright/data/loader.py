"""A rank's microbatches, made ready by one thread while the step before runs."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from meshwright.data.stream import Batch, Tokens

DEPTH = 2


class Samples(Protocol):
    """What training reads: a Stream, or what stands in for one."""

    global_batch: int
    held_out_samples: int

    def batch(self, step: int, first_index: int, count: int) -> Batch[Tokens]:
        """Samples `first_index` and on of a step's global batch."""
        ...

    def counted(self, step: int) -> int:
        """How many targets of a step's whole global batch are counted."""
        ...

    def held_out_batch(self, index: int, count: int) -> Batch[Tokens]:
        """Held-out samples `index` and on."""
        ...


class StepBatches(NamedTuple):
    """A rank's part of a step, and what it divides its summed losses by.

    counted: targets of the whole global batch that are counted, the same on every rank; 1 where none is, so that
        the loss is 0 and not undefined.
    """

    microbatches: list[Batch[Tensor]]
    counted: int


class Batches:
    """Of each step's global batch, the samples of one rank among `data_size` that share it.

    Rank r has the r-th contiguous share, and its microbatch m the m-th part of that. The thread holds nothing that
    matters: any step can be asked for at any time, and steps asked for in order are ready early.
    """

    def __init__(
        self,
        stream: Samples,
        *,
        data_rank: int,
        data_size: int,
        microbatch: int,
        accumulation: int,
        device: torch.device,
    ) -> None:
        if data_size * microbatch * accumulation != stream.global_batch:
            raise ValueError(f"{data_size} x {microbatch} x {accumulation} samples, global batch {stream.global_batch}")
        self._stream = stream
        self._first = data_rank * microbatch * accumulation
        self._microbatch = microbatch
        self._accumulation = accumulation
        # A new thread's current GPU is 0 whatever the process chose, so "cuda" alone would mean another device there.
        self._device = torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device
        self._coming: dict[int, Future[StepBatches]] = {}
        self._thread = ThreadPoolExecutor(1, "batches")

    def next(self, step: int) -> StepBatches:
        """A step's microbatches, each [microbatch, S], on the device. An error of the thread comes here."""
        for ahead in range(step, step + 1 + DEPTH):
            if ahead not in self._coming:
                self._coming[ahead] = self._thread.submit(self._load, ahead)
        ready = self._coming.pop(step).result()
        return StepBatches([self._send(batch) for batch in ready.microbatches], ready.counted)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _load(self, step: int) -> StepBatches:
        if self._device.type == "cuda":
            # Pinning on the thread's own current GPU would open a context on GPU 0 in every process.
            torch.cuda.set_device(self._device)
        firsts = [self._first + part * self._microbatch for part in range(self._accumulation)]
        batches = [self._stream.batch(step, first, self._microbatch) for first in firsts]
        return StepBatches([self._pin(batch) for batch in batches], max(1, self._stream.counted(step)))

    def _pin(self, batch: Batch[Tokens]) -> Batch[Tensor]:
        tensors = to_tensors(batch, torch.device("cpu"))
        return tensors.each(Tensor.pin_memory) if self._device.type == "cuda" else tensors

    def _send(self, batch: Batch[Tensor]) -> Batch[Tensor]:
        return batch.each(lambda tensor: tensor.to(self._device, non_blocking=True))


def to_tensors(batch: Batch[Tokens], device: torch.device) -> Batch[Tensor]:
    """A batch on the device, at once."""
    return batch.each(lambda array: torch.from_numpy(array).to(device))
