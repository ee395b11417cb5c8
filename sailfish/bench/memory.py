"""The memory plan beside what was measured, row by row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sailfish.engine.api import MemoryReading

_NOT_COMPARED = ("kv_blocks", "margin")
"""KV blocks are exact by construction and would hide the rest; a margin is not there to be used."""


def error_percent(memory: Sequence[MemoryReading]) -> float:
    """Return how far the planned sum is from the measured one, KV blocks and margin left out."""
    lines = [line for line in memory if line.name not in _NOT_COMPARED]
    planned = sum(line.planned_bytes for line in lines)
    measured = sum(line.measured_bytes or 0 for line in lines)
    return 100.0 * (planned - measured) / measured


def figures(
    memory: Sequence[MemoryReading], reserved_bytes: Sequence[int]
) -> Iterator[tuple[str, float, str]]:
    """Yield (row, value, unit): each line measured, the plan's error, and the growth since READY.

    `reserved_bytes`: the device memory held at READY and after the last request.
    """
    for line in memory:
        if line.measured_bytes is not None:
            name = "resident weights" if line.name == "weights" else f"memory: {line.name}"
            yield name, line.measured_bytes / 1e9, "GB"
    yield "memory: plan against measured, without KV blocks", error_percent(memory), "%"
    yield "memory: growth after READY", (reserved_bytes[-1] - reserved_bytes[0]) / 1e6, "MB"
