"""Foresees how long the next step need not be planned, because the device still computes the one before."""

from __future__ import annotations

_UNIT_TOKENS = 128
_LONG_S = 0.012
"""Shorter steps are followed at once: what comes meanwhile waits little, and a late plan idles the device."""
_SHARE = 0.85
_PLAN_S = 0.002
"""To plan a step and launch it as a graph takes less."""
_WAITED_S = 0.0005
"""Who waited no longer for a step's tokens came when the device had ended it, nobody knows how long ago."""
_FORGET = 1.02
"""A time that is never reached again is forgotten in some steps, as when a cache fills."""


class StepTimes:
    """The least time of steps by their number of tokens, as lately measured, and what the host takes."""

    def __init__(self) -> None:
        self._least_s: dict[int, float] = {}
        self._plan_s = _PLAN_S

    def note_launch(self, took_s: float) -> None:
        """Count what the host took to plan and launch a step: the next one may take as long."""
        self._plan_s = max(took_s, _PLAN_S)

    def observe(self, n_tokens: int, elapsed_s: float, waited_s: float) -> None:
        """Count a step of `elapsed_s`, for whose tokens the host waited `waited_s` of it.

        A host that did not wait measured itself: to plan later for it would lengthen the steps more and more.
        """
        size = n_tokens // _UNIT_TOKENS
        if waited_s < _WAITED_S:
            self._least_s.pop(size, None)
        else:
            self._least_s[size] = min(elapsed_s, self._least_s.get(size, elapsed_s) * _FORGET)

    def spare_s(self, n_tokens: int) -> float:
        """Return the seconds from a step's beginning for which the next one need not be planned."""
        least_s = self._least_s.get(n_tokens // _UNIT_TOKENS, 0.0)
        return least_s * _SHARE - self._plan_s if least_s >= _LONG_S else 0.0
