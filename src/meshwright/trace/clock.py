"""When things happened on the device, without ever waiting for it."""

import time

import torch


class Mark:
    """A moment of the training thread; on a GPU also the one at which the device got that far."""

    def __init__(self, host_s: float, event: torch.cuda.Event | None) -> None:
        self.host_s = host_s
        self.event = event


class Clock:
    """Marks moments and tells, later and in order, when they were: seconds since the epoch.

    A GPU's events give the time from one to the next, to half a microsecond, so moments are a chain from an anchor. The
    host knows that a mark lies between the time at which it was made and the one at which it is asked for, and that
    keeps the chain from drifting.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        # The mark resolved last, and when it was.
        self._last: Mark | None = None
        self._last_s = 0.0

    def mark(self) -> Mark:
        """Now; on a GPU, when it has done what was launched on the current stream so far."""
        if not self._cuda:
            return Mark(time.time(), None)
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return Mark(time.time(), event)

    def resolve(self, mark: Mark) -> float | None:
        """When a mark was, or None as long as the device has not come to it. Marks are asked for in their order."""
        if mark.event is None:
            return mark.host_s
        if mark is self._last:
            return self._last_s
        if not mark.event.query():
            return None
        if self._last is None or self._last.event is None:
            at = mark.host_s
        else:
            at = self._last_s + self._last.event.elapsed_time(mark.event) * 1e-3
        self._last, self._last_s = mark, min(max(at, mark.host_s, self._last_s), time.time())
        return self._last_s

    def settle(self) -> None:
        """Wait for the device."""
        if self._cuda:
            torch.cuda.synchronize(self._device)
