"""A rank's microbatches, made ready by one thread while the step before runs."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from meshwright.data.stream import Stream, Tokens

DEPTH = 2
Microbatches = list[tuple[Tensor, Tensor]]


class Batches:
    """Of each step's global batch, the samples of one rank among `data_size` that share it.

    Rank r has the r-th contiguous share, and its microbatch m the m-th part of that. The thread holds nothing that
    matters: any step can be asked for at any time, and steps asked for in order are ready early.
    """

    def __init__(
        self,
        stream: Stream,
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
        self._coming: dict[int, Future[Microbatches]] = {}
        self._thread = ThreadPoolExecutor(1, "batches")

    def next(self, step: int) -> Microbatches:
        """A step's (tokens, targets), each [microbatch, S], on the device. An error of the thread comes here."""
        for ahead in range(step, step + 1 + DEPTH):
            if ahead not in self._coming:
                self._coming[ahead] = self._thread.submit(self._load, ahead)
        ready = self._coming.pop(step).result()
        return [(self._send(tokens), self._send(targets)) for tokens, targets in ready]

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _load(self, step: int) -> Microbatches:
        if self._device.type == "cuda":
            # Pinning on the thread's own current GPU would open a context on GPU 0 in every process.
            torch.cuda.set_device(self._device)
        firsts = [self._first + part * self._microbatch for part in range(self._accumulation)]
        pairs = [self._stream.batch(step, first, self._microbatch) for first in firsts]
        return [(self._pin(tokens), self._pin(targets)) for tokens, targets in pairs]

    def _pin(self, array: Tokens) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self._device.type == "cuda" else tensor

    def _send(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)


def to_tensor(array: Tokens, device: torch.device) -> Tensor:
    """A batch on the device, at once."""
    return torch.from_numpy(array).to(device)
