"""The memory plan beside what was measured, as rows to store."""

from __future__ import annotations

from collections.abc import Sequence

from sailfish.bench.results import Recorder, Result
from sailfish.engine.api import MemoryReading

_NOT_COMPARED = ("kv_blocks", "margin")
"""KV blocks are exact by construction and would hide the rest; a margin is not there to be used."""


def error_percent(memory: Sequence[MemoryReading]) -> float:
    """Return how far the planned sum is from the measured one, KV blocks and margin left out."""
    lines = [line for line in memory if line.name not in _NOT_COMPARED]
    planned = sum(line.planned_bytes for line in lines)
    measured = sum(line.measured_bytes or 0 for line in lines)
    return 100.0 * (planned - measured) / measured


def results(
    memory: Sequence[MemoryReading], reserved_bytes: Sequence[int], recorder: Recorder, model: str
) -> list[Result]:
    """Return each line measured, with the plan as its target, the error, and the growth since READY.

    `reserved_bytes`: the device memory held at READY and after the last request.
    """
    rows = [
        recorder.result(
            f"{model}, memory: {line.name}",
            [line.measured_bytes / 2**20],
            "MiB",
            target=round(line.planned_bytes / 2**20, 2),
        )
        for line in memory
        if line.measured_bytes is not None
    ]
    rows.append(
        recorder.result(
            f"{model}, memory: plan against measured, without KV blocks", [error_percent(memory)], "%"
        )
    )
    growth_mib = (reserved_bytes[-1] - reserved_bytes[0]) / 2**20
    rows.append(recorder.result(f"{model}, memory: growth after READY", [growth_mib], "MiB"))
    return rows
