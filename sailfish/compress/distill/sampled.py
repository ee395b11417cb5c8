"""Has the teacher write windows to train on, and keeps them for a run that goes on later."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from sailfish.base.errors import ConfigError
from sailfish.checkpoint.files import read_bytes
from sailfish.compress.distill.ranks import Ranks, wait_for_all

Tell = Callable[[str, int, int], None]
"""Told (what is done, how much of it, in all)."""
Write = Callable[[Sequence[Sequence[int]], int, int], list[list[int]]]
"""Takes prompts, tokens to write on each and a seed; returns what the teacher wrote."""

_FILE = "sampled.json"
_MAX_BYTES = 4 << 30
_PROMPT_TOKENS = 16
"""Of the text that a window begins with."""
_AT_ONCE = 64


def sample(
    write: Write,
    windows: Sequence[Sequence[int]],
    wanted: int,
    directory: Path,
    ranks: Ranks,
    tell: Tell,
    *,
    seed: int,
) -> list[list[int]]:
    """Return windows that the teacher writes on beginnings of others, of their length.

    The first process has them written, once; they are kept in `directory`. Raises ConfigError for windows
    that are all beginning, and where other windows are kept than are wanted.
    """
    length, file = len(windows[0]), directory / _FILE
    if length <= _PROMPT_TOKENS:
        raise ConfigError(
            f"a teacher writes nothing on windows of {length} tokens",
            hint=f"use more than {_PROMPT_TOKENS}",
            param="length",
        )
    if ranks.rank == 0 and not file.exists():
        starts = [window[:_PROMPT_TOKENS] for window in windows]
        random.Random(seed).shuffle(starts)
        found: list[list[int]] = []
        while len(found) < wanted:
            numbers = range(len(found), min(len(found) + _AT_ONCE, wanted))
            prompts = [starts[n % len(starts)] for n in numbers]
            written = write(prompts, length - _PROMPT_TOKENS, seed + len(found))
            found += [[*prompt, *tokens] for prompt, tokens in zip(prompts, written, strict=True)]
            tell("sampling from the teacher", len(found), wanted)
        directory.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_bytes(msgspec.json.encode(found))
        partial.rename(file)
    wait_for_all(ranks)
    try:
        kept = msgspec.json.decode(read_bytes(file, _MAX_BYTES), type=list[list[int]])
    except msgspec.DecodeError as error:
        raise ConfigError(f"{file} holds no windows: {error}", hint="remove it") from None
    if len(kept) != wanted:
        raise ConfigError(
            f"{file} holds {len(kept)} windows, {wanted} are asked for", hint="give what that run was given"
        )
    return kept
