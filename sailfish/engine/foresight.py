"""Foresees how long the next step need not be planned, because the device still computes the one before."""

from __future__ import annotations

_UNIT_TOKENS = 128
_LONG_S = 0.012
"""Shorter steps are followed at once: what comes meanwhile waits little, and a late plan idles the device."""
_SHARE = 0.85
_PLAN_S = 0.002
"""To plan and launch a step takes less."""
_FORGET = 1.02
"""A time that is never reached again is forgotten in some steps, as when a cache fills."""


class StepTimes:
    """The least time of steps by their number of tokens, as lately measured."""

    def __init__(self) -> None:
        self._least_s: dict[int, float] = {}

    def observe(self, n_tokens: int, elapsed_s: float) -> None:
        """Count a step; `elapsed_s` is no less than the device took."""
        size = n_tokens // _UNIT_TOKENS
        self._least_s[size] = min(elapsed_s, self._least_s.get(size, elapsed_s) * _FORGET)

    def spare_s(self, n_tokens: int) -> float:
        """Return the seconds from a step's beginning for which the next one need not be planned."""
        least_s = self._least_s.get(n_tokens // _UNIT_TOKENS, 0.0)
        return least_s * _SHARE - _PLAN_S if least_s >= _LONG_S else 0.0
