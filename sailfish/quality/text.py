"""Reads the text that a measurement or a calibration is made of: plain, or JSON lines, compressed or not."""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from pathlib import Path
from typing import IO, cast

from sailfish.base.errors import ConfigError

TEXT_SEPARATOR = "\n\n"
"""Stands between two texts of a file when they are read as one stream."""
_PACKED = (".xz", ".gz")


def read_text(path: Path, *, max_chars: int | None = None) -> str:
    """Return a file's text: as it stands, or of JSON lines each "text", joined by a blank line.

    The name says how it is read: ".jsonl" for JSON lines, ".xz" or ".gz" behind it for compressed files.
    Reading stops at `max_chars`, so that the start of a long file costs little. Raises ConfigError.
    """
    is_lines = (path.with_suffix("") if path.suffix in _PACKED else path).suffix == ".jsonl"
    parts: list[str] = []
    left = max_chars
    try:
        with _opened(path) as file:
            for line in file:
                if left is not None and left <= 0:
                    break
                part = line.decode("utf-8")
                if is_lines:
                    part = _text(part, path, len(parts) + 1) + TEXT_SEPARATOR
                parts.append(part)
                left = None if left is None else left - len(part)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else "it is damaged"
        raise ConfigError(f"{path} cannot be read: {why}", param="text") from None
    except UnicodeDecodeError:
        raise ConfigError(
            f"line {len(parts) + 1} of {path} is not UTF-8", hint="convert the text", param="text"
        ) from None
    text = "".join(parts)
    if is_lines:
        text = text.removesuffix(TEXT_SEPARATOR)
    return text if max_chars is None else text[:max_chars]


def read_lines(path: Path, most: int | None = None) -> list[str]:
    """Return the lines of a file that are not blank, the first `most`; raises ConfigError."""
    found: list[str] = []
    try:
        with _opened(path) as file:
            for line in file:
                if most is not None and len(found) >= most:
                    break
                found += [line.decode("utf-8")] if line.strip() else []
    except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
        why = (
            error.strerror if isinstance(error, OSError) and error.strerror else "it is damaged or not UTF-8"
        )
        raise ConfigError(f"{path} cannot be read: {why}", param="tasks") from None
    return found


def _opened(path: Path) -> IO[bytes]:
    if path.suffix == ".xz":
        return lzma.open(path)
    return cast("IO[bytes]", gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _text(line: str, path: Path, number: int) -> str:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    text = entry.get("text") if isinstance(entry, dict) else None
    if not isinstance(text, str):
        raise ConfigError(
            f'line {number} of {path} is not an object with a "text"',
            hint='write one {"text": "..."} a line',
            param="text",
        )
    return text
