"""Steps captured as CUDA graphs, one for each planned size: decodes whole, of others the forward pass."""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from sailfish.kernels.cuda.graph import Graph, new_pool


class StepGraphs:
    """Captured steps that share one pool of temporaries.

    A decode is one graph, from its inputs to its draws; so is a forward pass with prompts, up to the head.
    """

    def __init__(self, buckets: Sequence[int], chunks: Sequence[int] = ()) -> None:
        """Take the numbers of runs of decodes, and of tokens of steps with prompts, ascending."""
        self._buckets = tuple(buckets)
        self._chunks = tuple(chunks)
        self._graphs: dict[int, Graph] = {}
        self._chunk_graphs: dict[int, Graph] = {}

    @property
    def most_runs(self) -> int:
        """The largest bucket."""
        return self._buckets[-1]

    @property
    def most_tokens(self) -> int:
        """The most tokens of a captured step with prompts."""
        return max(self._chunks, default=0)

    def fitting(self, n_runs: int) -> int | None:
        """Return the smallest captured number of runs that holds a decode of `n_runs`."""
        at = bisect_left(self._buckets, n_runs)
        return self._buckets[at] if self._graphs and at < len(self._buckets) else None

    def fitting_chunk(self, n_tokens: int) -> int | None:
        """Return the smallest captured number of tokens that holds a step of `n_tokens`."""
        at = bisect_left(self._chunks, n_tokens)
        return self._chunks[at] if self._chunk_graphs and at < len(self._chunks) else None

    def capture(self, decode: Callable[[int], Tensor], forward: Callable[[int], Tensor]) -> None:
        """Capture `decode(n_runs)` and `forward(n_tokens)` for every bucket."""
        pool = new_pool()
        was_collecting = gc.isenabled()
        gc.disable()  # the end of another engine's graph would end a capture too
        try:
            graphs = _captured(decode, self._buckets, pool)
            self._graphs, self._chunk_graphs = graphs, _captured(forward, self._chunks, pool)
        finally:
            if was_collecting:
                gc.enable()

    def replay(self, n_runs: int) -> Tensor:
        """Launch the step of a bucket; return what its capture returned, good until the next replay."""
        return self._graphs[n_runs].replay()

    def replay_chunk(self, n_tokens: int) -> Tensor:
        """Launch a forward pass; return what its capture returned, good until the next replay."""
        return self._chunk_graphs[n_tokens].replay()

    def launches(self) -> dict[int, dict[str, int]]:
        """Return how often decodes launch each kernel, by bucket; the last of equal neighbours stands."""
        found: dict[int, dict[str, int]] = {}
        for n_runs, graph in sorted(self._graphs.items()):
            counts = dict(graph.kernels())
            if found and found[(last := next(reversed(found)))] == counts:
                del found[last]
            found[n_runs] = counts
        return found


def _captured(function: Callable[[int], Tensor], sizes: Sequence[int], pool: object) -> dict[int, Graph]:
    """Capture the largest first, whose temporaries hold the rest's."""
    graphs = {}
    for size in reversed(sizes):
        function(size)  # loads what it needs, which a capture may not
        graphs[size] = Graph(partial(function, size), pool)
    return graphs
