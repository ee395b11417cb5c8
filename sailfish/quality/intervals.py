"""Intervals of means and quantiles over windows of text, whose tokens depend on each other.

A window is one observation: tokens of a window share an author and a subject, so an interval that took
tokens for independent would be too narrow. A paired difference is the mean of differences, token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from sailfish.base.errors import ConfigError

PerWindow = Sequence[NDArray[np.float64]]
"""A figure of every scored token, an array a window."""
CONFIDENCE = 0.95
_BLOCK = 1 << 20
"""Elements of the resamples that are held at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate, and where the true value lies with the confidence that was asked for."""

    value: float
    low: float
    high: float

    def map(self, function: Callable[[float], float]) -> Interval:
        """Return the interval of an increasing function of what this one estimates."""
        return Interval(value=function(self.value), low=function(self.low), high=function(self.high))

    def has(self, value: float) -> bool:
        """Say whether a value is inside, ends included."""
        return self.low <= value <= self.high


def normal_interval(values: PerWindow, *, confidence: float = CONFIDENCE) -> Interval:
    """Return the mean over all tokens and its normal interval over windows.

    With windows of one size it is the mean of the windows' means +- z * s / sqrt(windows); else that of a
    ratio of sums. Source: Cochran 1977, section 2.11. Raises ConfigError for fewer than two windows.
    """
    sum_W, count_W = _sums(values)
    n_windows = len(sum_W)
    mean = float(sum_W.sum() / count_W.sum())
    residual_W = sum_W - mean * count_W
    deviation = sqrt(float(residual_W @ residual_W) / (n_windows - 1))
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * deviation / sqrt(n_windows) / float(count_W.mean())
    return Interval(value=mean, low=mean - half, high=mean + half)


def bootstrap_interval(
    values: PerWindow, *, confidence: float = CONFIDENCE, n_resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Return the mean over all tokens, and percentiles of what it is over resampled windows.

    Source: Efron 1979. Raises ConfigError for fewer than two windows.
    """
    sum_W, count_W = _sums(values)
    means = [
        (times_RW @ sum_W) / (times_RW @ count_W)
        for times_RW in _resamples(len(sum_W), n_resamples, seed, len(sum_W))
    ]
    low, high = _ends(np.concatenate(means), confidence)
    return Interval(value=float(sum_W.sum() / count_W.sum()), low=low, high=high)


def quantile_interval(
    values: PerWindow,
    quantile: float,
    *,
    confidence: float = CONFIDENCE,
    n_resamples: int = 1_000,
    seed: int = 0,
) -> Interval:
    """Return the smallest token's figure that a share `quantile` of all tokens does not exceed.

    Its ends are percentiles of the same over resampled windows. Raises ConfigError for fewer than two
    windows.
    """
    _sums(values)
    all_T = np.concatenate(values)
    window_T = np.repeat(np.arange(len(values)), [len(window) for window in values])
    order_T = np.argsort(all_T, kind="stable")
    sorted_T, window_T = all_T[order_T], window_T[order_T]

    def at(times_RT: NDArray[np.int64]) -> NDArray[np.float64]:
        below_RT = times_RT.cumsum(1)
        rank_R1 = np.ceil(quantile * below_RT[:, -1:])
        found_R: NDArray[np.float64] = sorted_T[(below_RT < np.maximum(rank_R1, 1)).sum(1)]
        return found_R

    found = [at(times_RW[:, window_T]) for times_RW in _resamples(len(values), n_resamples, seed, len(all_T))]
    low, high = _ends(np.concatenate(found), confidence)
    return Interval(value=float(at(np.ones((1, len(all_T)), np.int64))[0]), low=low, high=high)


def _sums(values: PerWindow) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if len(values) < 2:
        raise ConfigError(
            f"{len(values)} window says nothing of how much windows differ",
            hint="measure two or more",
            param="n_windows",
        )
    sum_W = np.array([window.sum(dtype=np.float64) for window in values])
    return sum_W, np.array([len(window) for window in values], dtype=np.float64)


def _resamples(n_windows: int, n_resamples: int, seed: int, width: int) -> Iterator[NDArray[np.int64]]:
    """Yield how often each window is drawn in each resample, in blocks of bounded rows * width."""
    generator = np.random.Generator(np.random.PCG64(seed))
    share_W = np.full(n_windows, 1 / n_windows)
    rows = max(1, _BLOCK // width)
    for start in range(0, n_resamples, rows):
        yield generator.multinomial(n_windows, share_W, size=min(rows, n_resamples - start))


def _ends(found_R: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    low, high = np.quantile(found_R, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
