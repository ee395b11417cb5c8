"""What was measured of every token of some windows, and the figures and intervals that it adds up to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import exp, expm1

import numpy as np
from numpy.typing import NDArray

from sailfish.base.errors import ConfigError
from sailfish.quality.intervals import (
    CONFIDENCE,
    Interval,
    PerWindow,
    bootstrap_interval,
    normal_interval,
    quantile_interval,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What a model gave the tokens that came."""

    nll: PerWindow
    """Negative log-likelihoods in nats."""

    def first(self, n_windows: int) -> Scores:
        """Return the scores of the first windows."""
        return Scores(nll=self.nll[:n_windows])

    def perplexity(self, confidence: float = CONFIDENCE) -> Interval:
        """Return exp of the mean negative log-likelihood, with its normal interval."""
        return normal_interval(self.nll, confidence=confidence).map(exp)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A model beside its parent in figures. Intervals are of the windows' choice, nothing else."""

    n_windows: int
    n_tokens: int
    """Scored ones."""
    perplexity: Interval
    parent_perplexity: Interval
    increase: Interval
    """Perplexity / the parent's - 1, paired."""
    kl: Interval
    """Mean divergence from the parent, in nats."""
    kl_p99: Interval
    kl_p999: Interval
    top1: Interval
    """Share of tokens before which both find the same one likeliest."""
    acceptance: Interval
    """Share of tokens drawn from one that are kept in the other's place, as a draft's are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One model less another of the same parent, over the same windows: paired intervals."""

    perplexity: Interval
    """Ratio - 1."""
    kl: Interval
    top1: Interval
    acceptance: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What a model and its parent gave each scored token; `metrics.TokenComparison` says what each is."""

    model: Scores
    parent: Scores
    kl: PerWindow
    is_same_top: PerWindow
    acceptance: PerWindow

    @classmethod
    def of_windows(cls, figures: Iterable[Sequence[NDArray[np.float64]]]) -> Comparison:
        """Take the figures of each window, one or more, in the order of `metrics.TokenComparison`."""
        nll, parent_nll, kl, is_same_top, acceptance = (list(column) for column in zip(*figures, strict=True))
        return cls(
            model=Scores(nll=nll),
            parent=Scores(nll=parent_nll),
            kl=kl,
            is_same_top=is_same_top,
            acceptance=acceptance,
        )

    def first(self, n_windows: int) -> Comparison:
        """Return the comparison over the first windows."""
        return Comparison(
            model=self.model.first(n_windows),
            parent=self.parent.first(n_windows),
            kl=self.kl[:n_windows],
            is_same_top=self.is_same_top[:n_windows],
            acceptance=self.acceptance[:n_windows],
        )

    def window_means(self) -> Iterator[tuple[float, ...]]:
        """Yield each window's means, in the order of `metrics.TokenComparison`."""
        columns = self.model.nll, self.parent.nll, self.kl, self.is_same_top, self.acceptance
        for window in zip(*columns, strict=True):
            yield tuple(float(figure_S.mean()) for figure_S in window)

    def summary(self, confidence: float = CONFIDENCE) -> Summary:
        """Return all figures: means with normal intervals, quantiles with those of a seeded bootstrap."""
        apart = _apart(self.model.nll, self.parent.nll)
        return Summary(
            n_windows=len(self.kl),
            n_tokens=sum(map(len, self.kl)),
            perplexity=self.model.perplexity(confidence),
            parent_perplexity=self.parent.perplexity(confidence),
            increase=normal_interval(apart, confidence=confidence).map(expm1),
            kl=normal_interval(self.kl, confidence=confidence),
            kl_p99=quantile_interval(self.kl, 0.99, confidence=confidence),
            kl_p999=quantile_interval(self.kl, 0.999, confidence=confidence),
            top1=normal_interval(self.is_same_top, confidence=confidence),
            acceptance=normal_interval(self.acceptance, confidence=confidence),
        )


def difference(one: Comparison, other: Comparison, confidence: float = CONFIDENCE) -> Difference:
    """Return how `one` differs from `other`, by a seeded bootstrap over their windows.

    Raises ConfigError unless both were measured over the same tokens.
    """

    def paired(ones: PerWindow, others: PerWindow) -> Interval:
        return bootstrap_interval(_apart(ones, others), confidence=confidence)

    return Difference(
        perplexity=paired(one.model.nll, other.model.nll).map(expm1),
        kl=paired(one.kl, other.kl),
        top1=paired(one.is_same_top, other.is_same_top),
        acceptance=paired(one.acceptance, other.acceptance),
    )


def _apart(ones: PerWindow, others: PerWindow) -> PerWindow:
    if list(map(len, ones)) != list(map(len, others)):
        raise ConfigError(
            f"figures of {len(ones)} and {len(others)} windows cannot be paired: the windows differ",
            hint="measure both over one text, with the same windows",
            param="windows",
        )
    return [np.subtract(one, other) for one, other in zip(ones, others, strict=True)]
