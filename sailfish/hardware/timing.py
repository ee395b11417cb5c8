"""One timer for both devices: wall clock on the CPU, events in the stream on CUDA."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Timer:
    """Time the work between `start` and `stop`, in seconds, as the device spends it."""

    def __init__(self, device: str) -> None:
        self._is_cuda = device.startswith("cuda")
        self._begin_s = 0.0
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def start(self) -> None:
        """Begin; on CUDA after the work already queued."""
        if self._is_cuda:
            import torch

            make = torch.cuda.Event
            self._events = (make(enable_timing=True), make(enable_timing=True))  # type: ignore[no-untyped-call]
            self._events[0].record()
        self._begin_s = time.perf_counter()

    def stop(self) -> float:
        """Return the seconds since `start`; on CUDA it waits until the device is there."""
        if self._events is None:
            return time.perf_counter() - self._begin_s
        begin, end = self._events
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
