"""Cuts the windows that a compression learns from and is measured on. No torch."""

from __future__ import annotations

import functools
import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sailfish.base.errors import ConfigError
from sailfish.checkpoint.tokenizer import Tokenizer
from sailfish.compress.recipe import Calibration
from sailfish.data import sample_text
from sailfish.quality.text import read_text
from sailfish.quality.windows import Window, calibration_windows, evaluation_windows


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Windows of tokens, and where they are from."""

    calibration: list[Window]
    evaluation: list[Window]
    calibration_words: str
    evaluation_words: str
    warnings: list[str]

    @property
    def digest(self) -> str:
        """SHA-256 over the calibration windows' tokens, 32 bits each, in order."""
        state = hashlib.sha256()
        for window in self.calibration:
            state.update(array("I", window.tokens).tobytes())
        return state.hexdigest()


def read_texts(
    source: Path,
    calibration: Path | None,
    evaluation: Path | None,
    wanted: Calibration,
    n_evaluation: int,
    *,
    vocab_size: int,
    context_tokens: int,
) -> Texts:
    """Read and cut both texts with the tokenizer in `source`; raises ConfigError.

    A file that ends in .json holds token ids; others hold text, as `quality.text.read_text` takes it.
    Without a `calibration` it is the packaged text, without an `evaluation` the end of the calibration's
    file, from which no calibration window is drawn.
    """
    warnings: list[str] = []
    window_tokens = wanted.tokens
    if window_tokens > context_tokens:
        warnings.append(f"windows are cut to the model's context of {context_tokens} tokens")
        window_tokens = context_tokens
    name = "the packaged text" if calibration is None else str(calibration)
    if calibration is None:
        warnings.append(
            "calibrated with the packaged text; --calibration takes one like what the model will read"
        )
    ids = _ids(source, calibration or sample_text(), vocab_size)
    n_held = 0 if evaluation is not None else n_evaluation
    n_there = len(ids) // window_tokens - n_held
    n_windows = min(wanted.samples, n_there)
    if n_windows < 1:
        raise ConfigError(
            f"{name} has {len(ids)} tokens, which are not enough: {n_held + 1} windows of {window_tokens}",
            hint="give a longer text, or ask for fewer or shorter windows",
            param="calibration",
        )
    if n_windows < wanted.samples:
        warnings.append(f"{name} gives {n_windows} of the {wanted.samples} calibration windows asked for")
    held = ids[len(ids) - n_held * window_tokens :] if n_held else _ids(source, evaluation, vocab_size)
    return Texts(
        calibration=calibration_windows(
            ids[: len(ids) - n_held * window_tokens], n_windows, window_tokens=window_tokens, seed=wanted.seed
        ),
        evaluation=evaluation_windows(held, window_tokens=window_tokens, n_windows=n_evaluation),
        calibration_words=name,
        evaluation_words=f"the end of {name}" if evaluation is None else str(evaluation),
        warnings=warnings,
    )


def _ids(source: Path, file: Path | None, vocab_size: int) -> Sequence[int]:
    assert file is not None, "a text that nothing is held out for is given"
    try:
        changed_ns = file.stat().st_mtime_ns
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}", param="calibration") from None
    return _read_ids(source, file, vocab_size, changed_ns)


@functools.lru_cache(maxsize=2)
def _read_ids(source: Path, file: Path, vocab_size: int, changed_ns: int) -> Sequence[int]:
    """Read a text once for all the recipes that are done with it; one that changed is read again."""
    if file.suffix != ".json":
        return Tokenizer.load(source).encode(read_text(file), add_special=False)
    try:
        values = json.loads(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}", param="calibration") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{file} is not JSON", param="calibration") from None
    rows = values if isinstance(values, list) and all(isinstance(row, list) for row in values) else [values]
    ids = [value for row in rows if isinstance(row, list) for value in row]
    if not ids or not all(type(value) is int and 0 <= value < vocab_size for value in ids):
        raise ConfigError(
            f"{file} is not a list of token ids below {vocab_size}, nor a list of such lists",
            param="calibration",
        )
    return ids
