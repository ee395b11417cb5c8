"""Keeps what a parent makes of the measured windows, so that several recipes read it once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from sailfish.quality.windows import Window

DRIFT_WINDOWS = 8
"""Windows whose states after every block are kept, on the host; of the others only the last block's are."""


class ParentStates:
    """States of the measured windows in one parent, filled block by block by whoever reads it first."""

    def __init__(self) -> None:
        self._windows: Sequence[Window] = ()
        self._n_layers = 0
        self.last: list[Tensor] = []
        """Of each window, after the block read last; of a parent that was read whole after the final norm."""
        self.first: list[list[Tensor]] = []
        """After each block that was read, of the first windows."""

    @property
    def is_whole(self) -> bool:
        """Whether all blocks were read."""
        return 0 < self._n_layers == len(self.first)

    def begin(self, windows: Sequence[Window], n_layers: int, embedded: Sequence[Tensor]) -> None:
        """Start with the windows' embeddings, unless the same windows were read whole before."""
        if self.is_whole and self._windows == windows and self._n_layers == n_layers:
            return
        self._windows, self._n_layers = windows, n_layers
        self.last, self.first = list(embedded), []

    def read(self, run: Callable[[Tensor], Tensor]) -> None:
        """Run the next block over all windows."""
        self.last = [run(hidden_TD) for hidden_TD in self.last]
        self.first.append([hidden_TD.cpu() for hidden_TD in self.last[:DRIFT_WINDOWS]])
