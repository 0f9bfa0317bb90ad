"""Repeating a piece of work on all ranks at once, and timing it as the device's own clock has it."""

import time
from collections.abc import Callable
from math import ceil

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.record.calibration import Figure, Place

Work = Callable[[], object]

# As long may all of it last before what is left is measured with the fewest repeats.
ENOUGH_S = 120.0
# A GPU's events are as far apart as what lies between them at least lasts, and the host must have run ahead by then.
INNER_S = 2e-3
MOST_INNER = 100
FEWEST_REPEATS = 7
MOST_REPEATS = 100
# Of a piece of work, before it is decided how often to repeat it: the shorter one counts.
TRIALS = 2


class Clock(msgspec.Struct, frozen=True, kw_only=True):
    """device: that work runs on. share_s: how long to repeat a piece of it, in which MOST_REPEATS are enough.
    begun_s: of time.monotonic(), when the first was measured. sharing: ranks that take turns on a core of a CPU.
    """

    device: torch.device
    share_s: float
    begun_s: float
    sharing: float = 1.0

    def measure(
        self,
        work: str,
        sizes: tuple[int, ...],
        run: Work,
        *,
        before: Work | None = None,
        after: Work | None = None,
        on_host: bool = False,
        ranks: int = 1,
        place: Place | None = None,
    ) -> Figure:
        """Run it on every rank at once, each as often as the others.

        before, after: what goes around each repeat, untimed. on_host: until the call returns, whatever the device
        still has to do then.
        """
        alone = self.device.type == "cpu" and ranks == 1
        timer = self.count_own_seconds if alone and torch.get_num_threads() == 1 else time.perf_counter
        self.repeat(run, 1, before, after, timer, on_host=True)
        # The second time nothing is compiled, loaded or allocated any more.
        spent_s = time.monotonic() - self.begun_s
        once_s, spent_s = self.agree([min(self.repeat(run, TRIALS, before, after, timer, on_host=on_host)), spent_s])
        share_s = self.share_s if spent_s < ENOUGH_S else 0.0
        inner = 1
        if self.device.type == "cuda" and before is None and after is None and not on_host:
            inner = min(MOST_INNER, ceil(INNER_S / max(once_s, 1e-9)))
        repeats = min(MOST_REPEATS, max(FEWEST_REPEATS, int(share_s / (inner * max(once_s, 1e-9)))))
        seconds = sorted(self.repeat(run, repeats, before, after, timer, on_host=on_host, inner=inner))
        # What else runs on a CPU can only lengthen a kernel. A collective is waited for by whoever comes first, and in
        # training too.
        figure_s, spread = self.agree([seconds[0 if alone else repeats // 2], spread_of(seconds)])
        return Figure(
            work=work, sizes=sizes, seconds=figure_s, spread=spread, repeats=repeats * inner, ranks=ranks, place=place
        )

    def repeat(
        self,
        run: Work,
        repeats: int,
        before: Work | None,
        after: Work | None,
        timer: Callable[[], float],
        *,
        on_host: bool,
        inner: int = 1,
    ) -> list[float]:
        """Seconds of each repeat; on the host, as `timer` counts them."""
        if self.device.type == "cuda" and not on_host:
            return self.repeat_on_gpu(run, repeats, before, after, inner)
        seconds: list[float] = []
        for _ in range(repeats):
            self.settle()
            if before is not None:
                before()
            start_s = timer()
            for _ in range(inner):
                run()
            seconds.append((timer() - start_s) / inner)
            if after is not None:
                after()
        self.settle()
        return seconds

    def repeat_on_gpu(
        self, run: Work, repeats: int, before: Work | None, after: Work | None, inner: int
    ) -> list[float]:
        """Between events on the device's stream, so that the host's launches are hidden as they are in training."""
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        self.settle()
        for start, end in events:
            if before is not None:
                before()
            start.record()
            for _ in range(inner):
                run()
            end.record()
            if after is not None:
                after()
        self.settle()
        return [start.elapsed_time(end) / 1e3 / inner for start, end in events]

    def count_own_seconds(self) -> float:
        """Of one thread: by the processor that it had, not by what other programs left of it."""
        return time.process_time() * self.sharing

    def settle(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def agree(self, values: list[float]) -> list[float]:
        """The largest of each over all ranks, which have all come to this point then."""
        largest = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    def normal(self, *shape: int, dtype: torch.dtype | None = None, graded: bool = False) -> Tensor:
        """Random numbers on the device: zeros would draw less power, and be multiplied faster, than real ones."""
        values = torch.randn(shape, device=self.device, dtype=dtype or self.dtype)
        return values.requires_grad_(graded)

    @property
    def dtype(self) -> torch.dtype:
        """What matrix products are computed in: as layout.precision = "auto" has it."""
        if self.device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def spread_of(seconds: list[float]) -> float:
    """Between the 10th and the 90th hundredth of what is in order, over the middle."""
    last = len(seconds) - 1
    return (seconds[round(0.9 * last)] - seconds[round(0.1 * last)]) / seconds[len(seconds) // 2]
