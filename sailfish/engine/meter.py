"""Measures what each part of a starting engine really takes, beside what the plan said."""

from __future__ import annotations

import torch

from sailfish.engine.api import MemoryReading
from sailfish.hardware.memory import anonymous_bytes, begin_cuda_peak, cuda_memory, trim_heap
from sailfish.plan.types import Plan


class Meter:
    """Attributes the growth of memory between two marks to the part that was made in between.

    CUDA: live tensors by torch's allocator, its peak during the warm-up, and the driver's view for the
    rest. CPU: the resident set without file pages; there a step's peak is what it made the heap grow by.
    """

    def __init__(self, device: torch.device, *, idle_free_bytes: int) -> None:
        self._is_cuda = device.type == "cuda"
        self._idle_free_bytes = idle_free_bytes
        if self._is_cuda:
            torch.zeros(1, device=device)  # makes the context, which is not the weights' doing
            begin_cuda_peak()
        self._parts: dict[str, int] = {}
        self._graphs_driver_bytes = 0
        self._last_bytes = self._first_bytes = self._held_bytes()

    def mark(self, name: str) -> None:
        """Attribute what was taken since the last mark."""
        if self._is_cuda:
            memory = cuda_memory()
            if name == "activations":
                self._parts[name] = memory.peak_allocated_bytes - self._last_bytes
                self._before_graphs = memory
                return
            if name == "graphs":  # their pool is reserved, not allocated; the driver holds the rest
                before = self._before_graphs
                taken_bytes = before.free_bytes - memory.free_bytes
                self._parts[name] = max(taken_bytes, 0)
                self._graphs_driver_bytes = taken_bytes - memory.reserved_bytes + before.reserved_bytes
                return
            begin_cuda_peak()
        held_bytes = self._held_bytes()
        self._parts[name] = max(held_bytes - self._last_bytes, 0)
        self._last_bytes = held_bytes

    @property
    def runtime_bytes(self) -> int:
        """Memory that is none of the parts: context and libraries, or interpreter and torch."""
        if not self._is_cuda:
            return self._first_bytes
        memory = cuda_memory()
        driver_bytes = self._idle_free_bytes - memory.free_bytes - memory.reserved_bytes
        return max(driver_bytes - self._graphs_driver_bytes, 0)

    def readings(self, plan: Plan) -> list[MemoryReading]:
        """Return every line of the plan with its measurement; None where nothing can be measured."""
        measured = {**self._parts, "runtime": self.runtime_bytes}
        return [MemoryReading(line.name, line.bytes, measured.get(line.name)) for line in plan.memory]

    def _held_bytes(self) -> int:
        if self._is_cuda:
            return cuda_memory().allocated_bytes
        trim_heap()
        return anonymous_bytes()
