"""Which rows `--only` picks."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase


def is_wanted(name: str, only: Sequence[str]) -> bool:
    """Say whether a row is picked: no patterns, or one that fits a part of its name (`*`: anything)."""
    return not only or any(fnmatchcase(name, f"*{pattern.strip()}*") for pattern in only)
