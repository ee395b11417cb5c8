"""Read the small files of a model directory: regular files only, under a size cap, as strict JSON."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from sailfish.base.errors import CheckpointError

MAX_JSON_BYTES = 16 << 20
DOWNLOAD_AGAIN = "download it again"
_MEND = "mend it, or download it again"
_SHOWN_CHARS = 100

T = TypeVar("T")


def shown(value: object) -> str:
    """Return `value` as it may stand in an error message: one line, at most 100 characters."""
    text = (
        repr(value) if not isinstance(value, int) or value.bit_length() < 256 else "a number of many digits"
    )
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 3] + "..."


def file_size(path: Path) -> int:
    """Return the size in bytes of a regular file (a symlink to one is fine), or raise CheckpointError."""
    try:
        status = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise CheckpointError(
                f"{path} is a link to {path.readlink()}, which is not there", hint=DOWNLOAD_AGAIN
            ) from None
        raise CheckpointError(
            f"{path.name} is missing in {path.parent}", hint="check the path, or download all of its files"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a regular file", hint=DOWNLOAD_AGAIN)
    return status.st_size


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Return a file's bytes, or raise CheckpointError when it is absent, unreadable or too large."""
    size = file_size(path)
    if size > max_bytes:
        raise CheckpointError(f"{path} has {size} bytes, at most {max_bytes} are read", hint=DOWNLOAD_AGAIN)
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}", hint="check its permissions"
        ) from None


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Return the JSON object in a file."""
    return parse_object(read_bytes(path, max_bytes), str(path))


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """Parse one JSON object strictly: UTF-8, no duplicate keys, no NaN or Infinity."""
    try:
        value = json.loads(data.decode(), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except RecursionError:
        raise CheckpointError(f"{where} is nested too deeply", hint=_MEND) from None
    except ValueError as error:  # also bad UTF-8 and integers of too many digits
        raise CheckpointError(f"{where} is not valid JSON: {shown(str(error))}", hint=_MEND) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} holds a JSON {type(value).__name__}, not an object", hint=_MEND)
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {shown(twice)} stands twice")
    return values


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


class Keys:
    """Typed, bounded access to a JSON object; every complaint names the file, the key and the value."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def has(self, key: str) -> bool:
        """Say whether the key is there with a value other than null."""
        return self.values.get(key) is not None

    def integer(self, key: str, low: int, high: int) -> int:
        """Return a required integer in low .. high."""
        wanted = f"an integer from {low} to {high}"
        return int(self._get(key, lambda v: type(v) is int and low <= v <= high, wanted))

    def number(self, key: str, low: float, high: float) -> float:
        """Return a required finite number in low .. high."""

        def is_fine(value: Any) -> bool:
            return type(value) in (int, float) and low <= value <= high and math.isfinite(value)

        return float(self._get(key, is_fine, f"a number from {low:g} to {high:g}"))

    def text(self, key: str) -> str:
        """Return a required string."""
        return str(self._get(key, lambda v: isinstance(v, str), "a string"))

    def integer_or(self, key: str, low: int, high: int, default: T) -> int | T:
        """Return the integer, or `default` when the key is absent or null."""
        return self.integer(key, low, high) if self.has(key) else default

    def number_or(self, key: str, low: float, high: float, default: T) -> float | T:
        """Return the number, or `default` when the key is absent or null."""
        return self.number(key, low, high) if self.has(key) else default

    def text_or(self, key: str, default: T) -> str | T:
        """Return the string, or `default` when the key is absent or null."""
        return self.text(key) if self.has(key) else default

    def flag(self, key: str, default: bool = False) -> bool:
        """Return true or false, or `default` when the key is absent or null."""
        return (
            self._get(key, lambda v: type(v) is bool, "true or false") is True if self.has(key) else default
        )

    def object_or(self, key: str) -> Keys | None:
        """Return the nested object, or None when the key is absent or null."""
        if not self.has(key):
            return None
        return Keys(self._get(key, lambda v: isinstance(v, dict), "an object"), f"{self.where}: {key}")

    def list_or(self, key: str, is_item: Callable[[Any], bool], wanted: str) -> list[Any] | None:
        """Return a list whose items all satisfy `is_item`, or None when the key is absent or null."""
        if not self.has(key):
            return None
        value = self._get(key, lambda v: isinstance(v, list) and all(map(is_item, v)), f"a list of {wanted}")
        return list(value)

    def _get(self, key: str, is_fine: Callable[[Any], bool], wanted: str) -> Any:
        if not self.has(key):
            raise CheckpointError(f"{self.where} lacks {key!r}, which must be {wanted}", param=key)
        value = self.values[key]
        if not is_fine(value):
            raise CheckpointError(f"{self.where}: {key} is {shown(value)}; it must be {wanted}", param=key)
        return value
