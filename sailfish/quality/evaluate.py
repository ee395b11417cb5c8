"""Reads windows with a model, or with several and their parent, and returns what each gave every token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sailfish.base.errors import ConfigError, EngineError
from sailfish.quality.metrics import TokenComparison, compare_tokens, token_nll
from sailfish.quality.model import WindowModel
from sailfish.quality.scores import Comparison, Scores
from sailfish.quality.windows import Window

Progress = Callable[[int, int], None]
"""Told (windows done, windows in all)."""
_CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 25}
"""Logits worked on at a time: near a CPU's caches; on a GPU, some 128 MiB a temporary."""


@torch.inference_mode()
def score(model: WindowModel, windows: Sequence[Window], progress: Progress | None = None) -> Scores:
    """Return the negative log-likelihood of every scored token.

    Raises ConfigError for a window that the model cannot read, EngineError for logits that are not finite.
    """
    _check([model], windows)
    found: list[NDArray[np.float64]] = []
    for done, window in enumerate(windows, 1):
        hidden_SD, target_S = _predicting(model, window)
        chunks = chunks_of(len(target_S), model.config.vocab_size, model.device.type)
        nll = [token_nll(model.logits(hidden_SD[rows]), target_S[rows]) for rows in chunks]
        found.append(_finite(torch.cat(nll), done))
        if progress is not None:
            progress(done, len(windows))
    return Scores(nll=found)


def compare(
    model: WindowModel, parent: WindowModel, windows: Sequence[Window], progress: Progress | None = None
) -> Comparison:
    """Return what sets a model apart from its parent, token by token; raises as `score` does."""
    return compare_all([model], parent, windows, progress)[0]


@torch.inference_mode()
def compare_all(
    models: Sequence[WindowModel],
    parent: WindowModel,
    windows: Sequence[Window],
    progress: Progress | None = None,
) -> list[Comparison]:
    """Return the comparison of each model with the parent, which reads every window once.

    Models may be on other devices than the parent. Raises as `score` does.
    """
    _check([parent, *models], windows)
    found: list[list[list[NDArray[np.float64]]]] = [[] for _ in models]
    for done, window in enumerate(windows, 1):
        parent_SD, target_S = _predicting(parent, window)
        hidden = [_predicting(model, window)[0] for model in models]
        parts: list[list[TokenComparison]] = [[] for _ in models]
        for rows in chunks_of(len(target_S), parent.config.vocab_size, parent.device.type):
            parent_CV = parent.logits(parent_SD[rows])
            for model, hidden_SD, part in zip(models, hidden, parts, strict=True):
                logits_CV = model.logits(hidden_SD[rows]).to(parent.device)
                part.append(compare_tokens(logits_CV, parent_CV, target_S[rows]))
        for figures, part in zip(found, parts, strict=True):
            figures.append(on_host(part, done))
        if progress is not None:
            progress(done, len(windows))
    return [Comparison.of_windows(figures) for figures in found]


def chunks_of(n_rows: int, vocab_size: int, device: str) -> Iterator[slice]:
    """Yield the rows of a window whose logits are worked on together, on "cpu" or "cuda"."""
    rows = max(1, _CHUNK_ELEMENTS[device] // vocab_size)
    for start in range(0, n_rows, rows):
        yield slice(start, min(start + rows, n_rows))


def on_host(parts: Sequence[TokenComparison], number: int) -> list[NDArray[np.float64]]:
    """Return each figure of window `number`, joined; raises EngineError where one is not finite."""
    return [_finite(torch.cat(column), number) for column in zip(*parts, strict=True)]


def _predicting(model: WindowModel, window: Window) -> tuple[Tensor, Tensor]:
    """Return the hidden states before the scored tokens, and those tokens."""
    hidden_TD = model.hidden(window.tokens)
    target_S = torch.tensor(window.tokens[window.n_context :], dtype=torch.int64).to(model.device)
    return hidden_TD[window.n_context - 1 : -1], target_S


def _finite(figure_S: Tensor, number: int) -> NDArray[np.float64]:
    """Return the figure on the host; what was not finite in the logits is not finite in it."""
    values: NDArray[np.float64] = figure_S.cpu().numpy()
    if not np.isfinite(values).all():
        raise EngineError(
            f"the logits of window {number} are not finite at {int((~np.isfinite(values)).sum())} tokens",
            hint="a weight or an activation overflowed: look at the last step of compression",
        )
    return values


def _check(models: Sequence[WindowModel], windows: Sequence[Window]) -> None:
    if not windows:
        raise ConfigError("there is no window to read", hint="give one or more", param="windows")
    vocab = min(model.config.vocab_size for model in models)
    if any(model.config.vocab_size != vocab for model in models):
        sizes = sorted({model.config.vocab_size for model in models})
        raise ConfigError(
            f"models of {' and '.join(map(str, sizes))} tokens cannot be compared",
            hint="compare models of one vocabulary",
            param="against",
        )
    room = min(model.window_tokens for model in models)
    for number, window in enumerate(windows, 1):
        if not 1 <= window.n_context < len(window.tokens) <= room:
            raise ConfigError(
                f"window {number} has {len(window.tokens)} tokens, {window.n_context} of them context; "
                f"the models read up to {room}",
                hint="cut other windows",
                param="windows",
            )
        if not 0 <= min(window.tokens) <= max(window.tokens) < vocab:
            raise ConfigError(
                f"window {number} has tokens that are not among the models' {vocab}",
                hint="tokenise the text with the models' own tokenizer",
                param="windows",
            )
