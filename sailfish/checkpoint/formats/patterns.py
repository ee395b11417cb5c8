"""Match module names against the patterns of a quantization_config, in bounded time."""

from __future__ import annotations

import re

from sailfish.base.errors import CheckpointError, UnsupportedModelError
from sailfish.checkpoint.files import shown

LINEAR_CLASSES = ("Linear", "LinearBase")
MAX_CHARS = 500
MAX_REPEATS = 4
_GREEDY_GROUP = re.compile(r"\)[*+{?]|\\[1-9]|\(\?P=")
_REPEAT = re.compile(r"(?<!\\)[*+{]")


def matches(module: str, pattern: str) -> bool:
    """Say whether a linear's name is what a pattern means (an exact name, re:, in:, or its class)."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    if pattern.startswith("in:"):
        return pattern[3:] in module
    return pattern in LINEAR_CLASSES or pattern == module


def rank(pattern: str) -> int:
    """Return 0 for an exact name, 1 for an expression or a part of a name, 2 for a class."""
    if pattern.startswith(("re:", "in:")):
        return 1
    return 2 if pattern in LINEAR_CLASSES else 0


def check_pattern(pattern: str, where: str) -> str:
    """Return the pattern if matching it is cheap, else raise.

    A folder is data: an expression in it must not be able to keep this process busy. Repeated groups and
    many repeats in a row, which take exponential or high polynomial time, are refused.
    """
    if len(pattern) > MAX_CHARS:
        raise CheckpointError(
            f"{where}: a pattern has {len(pattern)} characters, at most {MAX_CHARS} are read"
        )
    if not pattern.startswith("re:"):
        return pattern
    expression = pattern[3:]
    if len(_REPEAT.findall(expression)) > MAX_REPEATS or _GREEDY_GROUP.search(expression):
        raise UnsupportedModelError(
            f"{where}: pattern {shown(pattern)} could take very long to match",
            hint=f"at most {MAX_REPEATS} repeats are read, and none of a group",
        )
    try:
        re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{where}: {shown(pattern)} is not a regular expression: {error}") from None
    return pattern
