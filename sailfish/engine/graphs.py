"""Decode steps captured as CUDA graphs, one for each planned number of runs."""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Callable, Sequence

from torch import Tensor

from sailfish.kernels.cuda.graph import Graph, new_pool


class DecodeGraphs:
    """Graphs of the whole step, inputs to draws, that share one pool of temporaries."""

    def __init__(self, buckets: Sequence[int]) -> None:
        """Take the numbers of runs to capture, ascending."""
        self._buckets = tuple(buckets)
        self._graphs: dict[int, Graph] = {}

    @property
    def most_runs(self) -> int:
        """The largest bucket."""
        return self._buckets[-1]

    def fitting(self, n_runs: int) -> int | None:
        """Return the smallest captured number of runs that holds `n_runs`."""
        at = bisect_left(self._buckets, n_runs)
        return self._buckets[at] if self._graphs and at < len(self._buckets) else None

    def capture(self, decode: Callable[[int], Tensor]) -> None:
        """Capture `decode(n_runs)` for every bucket; the largest first, whose temporaries hold the rest's."""
        pool = new_pool()
        captured: dict[int, Graph] = {}
        was_collecting = gc.isenabled()
        gc.disable()  # the end of another engine's graph would end a capture too
        try:
            for n_runs in reversed(self._buckets):
                decode(n_runs)  # loads what it needs, which a capture may not
                captured[n_runs] = Graph(lambda n=n_runs: decode(n), pool)  # type: ignore[misc]
        finally:
            if was_collecting:
                gc.enable()
        self._graphs = captured

    def replay(self, n_runs: int) -> Tensor:
        """Launch the step of a bucket; return what its capture returned, good until the next replay."""
        return self._graphs[n_runs].replay()

    def launches(self) -> dict[int, dict[str, int]]:
        """Return how often each step launches each kernel, by bucket; the last of equal neighbours stands."""
        found: dict[int, dict[str, int]] = {}
        for n_runs, graph in sorted(self._graphs.items()):
            counts = dict(graph.kernels())
            if found and found[(last := next(reversed(found)))] == counts:
                del found[last]
            found[n_runs] = counts
        return found
