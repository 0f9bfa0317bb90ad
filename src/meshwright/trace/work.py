"""What the program computes in a step: its FLOPs, told by each rank, and what program.json says of it."""

import time
from collections.abc import Sequence
from hashlib import sha256

import msgspec
import torch
from torch import Tensor, nn

from meshwright.record import Program, RunFolder, write_program
from meshwright.record.kineto.flops import Count
from meshwright.trace.compiled import compiled
from meshwright.trace.facts import (
    PRECISIONS,
    device_memory_bytes,
    device_name,
    library_versions,
    parameter_count,
    peak_flops_per_s,
)
from meshwright.trace.meeting import Meeting
from meshwright.trace.options import Options

COMPILED = (
    "not counted: torch.compile has compiled parts of the program, which do not tell what they run; "
    "give flops_per_step and precision"
)


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank tells of itself. model: the same on ranks that hold the same part of the model, or a copy."""

    count: Count
    parameters: int | None
    model: str


class Work:
    """Counts this rank's step, and on rank 0 puts all ranks' counts together."""

    def __init__(
        self,
        folder: RunFolder,
        options: Options,
        meeting: Meeting,
        device: torch.device,
        models: Sequence[nn.Module],
        parameters: Sequence[Tensor],
    ) -> None:
        self._folder, self._options, self._meeting, self._device = folder, options, meeting, device
        # Asked now, not beside the steps, in which FSDP puts other parameters in their place.
        self._parameters = count_parameters(models, parameters, meeting.world_size)
        self._model = fingerprint(models)
        self._shares: dict[int, Share] = {}
        self._said = False
        # Of this rank: seconds that its model FLOPs take at the device's peak; 0 where either is not known.
        self.useful_s = 0.0
        # Of the mean rank, on rank 0.
        self._mean_useful_s = 0.0
        self._versions = library_versions()

    def countable(self) -> bool:
        """Whether a step can be counted; if not, all is known by now."""
        if compiled():
            self.take(Count(flops=None, source=COMPILED))
        return not compiled()

    def take(self, count: Count) -> None:
        """What a step of this rank has. In any thread."""
        given = self._options.flops_per_step
        if given is not None:
            count = msgspec.structs.replace(count, flops=given / self._meeting.world_size, source="given")
        if self._options.precision is not None:
            dtype = next(dtype for dtype, word in PRECISIONS.items() if word == self._options.precision)
            count = msgspec.structs.replace(count, precision=dtype)
        self.useful_s = self._seconds(count.flops, count.precision)
        self._shares[self._meeting.rank] = Share(count=count, parameters=self._parameters, model=self._model)

    def listen(self) -> None:
        """In the background: tell rank 0; there, hear the others out and write down what is known. Raises OSError."""
        own = self._shares.get(self._meeting.rank)
        if own is None or self._said:
            return
        if self._meeting.rank != 0:
            self._meeting.tell(f"share/{self._meeting.rank}", msgspec.json.encode(own).decode())
        else:
            for rank in range(self._meeting.world_size):
                if rank not in self._shares:
                    word = self._meeting.told(f"share/{rank}")
                    if word is None:
                        return
                    self._shares[rank] = msgspec.json.decode(word, type=Share)
            write_program(self._folder, self.program())
        self._said = True

    def settle(self, patience_s: float) -> None:
        """At the end: hear those that have counted but not told yet."""
        deadline = time.monotonic() + patience_s
        while self._meeting.rank == 0 and self._shares and not self._said and time.monotonic() < deadline:
            self.listen()
            time.sleep(0.05)

    def program(self) -> Program:
        """As far as it is known by now."""
        counts = [share.count for share in self._shares.values()]
        flops = [count.flops for count in counts if count.flops is not None]
        whole = bool(counts) and len(flops) == len(counts)
        mean = sum(flops) / len(flops) if whole else None
        dtype = next((count.precision for count in counts if count.precision), None)
        source = next((c.source for c in counts if c.flops is None or whole), "not counted yet")
        self._mean_useful_s = self._seconds(mean, dtype)
        return Program(
            name=self._options.name,
            trainer=self._options.trainer,
            versions=self._versions,
            device=device_name(self._device),
            kind=self._device.type,
            world_size=self._meeting.world_size,
            memory_bytes=device_memory_bytes(self._device),
            peak_flops_per_s=peak_flops_per_s(self._device, dtype),
            precision=PRECISIONS.get(dtype, dtype) if dtype else None,
            parameters=self._all_parameters(),
            flops_per_step=mean,
            flops_from=source,
            tokens_per_step=self._options.tokens_per_step,
            recompute=any(count.recompute for count in counts),
        )

    def utilisation(self, step_s: float) -> float | None:
        """Model FLOPs utilisation of a step, 0 to 1; None where it is not known."""
        return self._mean_useful_s / step_s if self._mean_useful_s and step_s > 0 else None

    def _seconds(self, flops: float | None, dtype: str | None) -> float:
        peak = peak_flops_per_s(self._device, dtype)
        return flops / peak if flops and peak else 0.0

    def _all_parameters(self) -> int | None:
        """Of the whole model: ranks that hold the same count once, and a pipeline's stages add up."""
        parts = {share.model: share.parameters for share in self._shares.values()}
        known = [count for count in parts.values() if count is not None]
        return sum(known) if known and len(known) == len(parts) else None


def count_parameters(models: Sequence[nn.Module], parameters: Sequence[Tensor], world_size: int) -> int | None:
    """Of the models, or where none is known, of those that optimizers move; None where that tells not enough."""
    # Optimizers alone do not tell a pipeline's stages from copies of one model.
    if not models and world_size > 1:
        return None
    found = [p for model in models for p in model.parameters()] or parameters
    return parameter_count(models, list({id(p): p for p in found}.values()))


def fingerprint(models: Sequence[nn.Module]) -> str:
    """Equal for models whose parameters have the same names and whole shapes."""
    shapes = [[name, list(p.shape)] for model in models for name, p in model.named_parameters()]
    return sha256(msgspec.json.encode(shapes)).hexdigest()
