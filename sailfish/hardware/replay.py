"""Times work as a CUDA graph runs it: launched by the device, without the host's launch times."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

_WINDOW_US = 1500.0
"""What one replay lasts at least: the events around it then cost nothing."""
_MAX_CALLS = 256
_REPLAYS = 20


def replayed_us(calls: Sequence[Callable[[], object]], *, runs: int) -> list[float]:
    """Return microseconds per call, one median of twenty replays for each of `runs`.

    The calls are captured one after the other, as often as fills a replay; give one for each copy of the
    data that they rotate through. Each has to be capturable, and is called once before.
    """
    import torch

    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())  # the data is made there
    with torch.cuda.stream(side):
        for call in calls:
            call()
        once_us = _elapsed_us(lambda: [call() for call in calls]) / len(calls)
        n_rounds = math.ceil(min(_WINDOW_US / max(once_us, 1.0), _MAX_CALLS) / len(calls))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            for _ in range(n_rounds):
                for call in calls:
                    call()
        graph.replay()
        n_calls = n_rounds * len(calls)
        return [
            statistics.median(_elapsed_us(graph.replay) for _ in range(_REPLAYS)) / n_calls
            for _ in range(runs)
        ]


def launched_us(calls: Sequence[Callable[[], object]], *, runs: int) -> list[float]:
    """Return microseconds per call where a graph cannot hold it: launched by the host, medians of twenty."""
    for call in calls:
        call()
    return [
        statistics.median(_elapsed_us(calls[i % len(calls)]) for i in range(_REPLAYS)) for _ in range(runs)
    ]


def _elapsed_us(work: Callable[[], object]) -> float:
    """Return what the device takes for `work` on the current stream, in microseconds."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3
