"""Cuts a token stream into the windows that a measurement reads, or that a calibration is drawn from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from sailfish.base.errors import ConfigError

WINDOW_TOKENS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Consecutive tokens that a model reads from an empty cache."""

    tokens: Sequence[int]
    n_context: int = 1
    """Leading tokens that are read and not scored: one at least, which nothing before it predicts."""

    @property
    def n_scored(self) -> int:
        """Tokens that count."""
        return len(self.tokens) - self.n_context


def evaluation_windows(
    ids: Sequence[int],
    *,
    window_tokens: int = WINDOW_TOKENS,
    stride_tokens: int | None = None,
    n_windows: int | None = None,
) -> list[Window]:
    """Return the first windows of a stream, each begun `stride_tokens` after the one before it.

    Without a stride windows follow each other, and each scores all of its tokens but the first. With a
    shorter one they overlap: a window scores only what the one before it had not reached. Tokens past the
    last whole window are left out. Raises ConfigError where the stream has fewer than `n_windows`.
    """
    stride = window_tokens if stride_tokens is None else stride_tokens
    if window_tokens < 2:
        raise ConfigError(
            f"a window of {window_tokens} tokens scores none", hint="use 2 or more", param="window_tokens"
        )
    if not 1 <= stride <= window_tokens:
        raise ConfigError(
            f"a stride of {stride} tokens does not fit windows of {window_tokens}",
            hint=f"use 1 to {window_tokens}",
            param="stride_tokens",
        )
    n_there = max(0, (len(ids) - window_tokens) // stride + 1)
    n_wanted = max(1, n_there) if n_windows is None else n_windows
    _require(n_there, n_wanted, len(ids), window_tokens)
    return [
        Window(
            tokens=ids[k * stride : k * stride + window_tokens],
            n_context=1 if k == 0 else max(1, window_tokens - stride),
        )
        for k in range(n_wanted)
    ]


def calibration_windows(
    ids: Sequence[int], n_windows: int, *, window_tokens: int = WINDOW_TOKENS, seed: int = 0
) -> list[Window]:
    """Return windows drawn without replacement among those that follow each other, in the text's order.

    Raises ConfigError where the stream has fewer.
    """
    n_there = len(ids) // window_tokens
    _require(n_there, n_windows, len(ids), window_tokens)
    chosen = sorted(random.Random(seed).sample(range(n_there), n_windows))
    return [Window(tokens=ids[k * window_tokens : (k + 1) * window_tokens]) for k in chosen]


def _require(n_there: int, n_wanted: int, n_tokens: int, window_tokens: int) -> None:
    if n_wanted < 1 or n_there < n_wanted:
        raise ConfigError(
            f"{n_tokens} tokens give {n_there} windows of {window_tokens} tokens, {n_wanted} are asked for",
            hint="use a longer text, shorter windows or fewer of them",
            param="n_windows",
        )
