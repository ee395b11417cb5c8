"""Sizes, token counts and durations as people write them: "24GiB", "32k", "200ms"."""

from __future__ import annotations

import re

from sailfish.base.errors import ConfigError

_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-zµ]*)\s*", re.ASCII)
_BYTES = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _BYTES |= {_letter: 1024**_power, f"{_letter}ib": 1024**_power, f"{_letter}b": 1000**_power}
_COUNTS = {"": 1, "k": 1024, "m": 1024**2}
_SECONDS = {"": 1.0, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_MAX = 2**63 - 1


def parse_bytes(text: str) -> int:
    """Return the bytes that "24GiB", "24G" (both binary), "24GB" (decimal) or "123" name."""
    return _whole(text, _BYTES, "a size such as 24GiB, 512MB or 1048576")


def parse_count(text: str) -> int:
    """Return the count that "32k" (32768), "1m" (1048576) or "4096" name."""
    return _whole(text, _COUNTS, "a count such as 4096 or 32k (32768)")


def parse_duration_s(text: str) -> float:
    """Return the seconds that "200ms", "30s", "5m" or "1.5" name."""
    return _scaled(text, _SECONDS, "a duration such as 200ms, 30s or 5m")


def format_bytes(n_bytes: int) -> str:
    """Return the size with three figures and a binary unit, as in "15.0 GiB"."""
    if abs(n_bytes) < 1024:
        return f"{n_bytes} B"
    size, power = float(n_bytes), 0
    while abs(size) >= 999.5 and power < 4:
        size, power = size / 1024, power + 1
    digits = 2 if abs(size) < 9.995 else 1 if abs(size) < 99.95 else 0
    return f"{size:.{digits}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def format_count(count: int) -> str:
    """Return the count, whole multiples of 1024 as "32k"."""
    return f"{count // 1024}k" if count >= 1024 and count % 1024 == 0 else str(count)


def format_duration(seconds: float) -> str:
    """Return the duration with the unit that keeps it readable, as in "35.2 ms"."""
    if seconds >= 120:
        return f"{seconds / 60:.1f} min"
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def _whole(text: str, units: dict[str, int], wanted: str) -> int:
    value = _scaled(text, {unit: float(scale) for unit, scale in units.items()}, wanted)
    number, unit = _split(text, wanted)
    if number.isdigit():
        exact = int(number) * units[unit]
    else:
        exact = round(value)
    if exact > _MAX:
        raise ConfigError(f"{text.strip()!r} is too large", hint=f"write {wanted}")
    return exact


def _scaled(text: str, units: dict[str, float], wanted: str) -> float:
    number, unit = _split(text, wanted)
    if unit not in units:
        raise ConfigError(f"{text.strip()!r} has an unknown unit {unit!r}", hint=f"write {wanted}")
    return float(number) * units[unit]


def _split(text: str, wanted: str) -> tuple[str, str]:
    match = _NUMBER.fullmatch(text[:64])
    if match is None or len(text) > 64:
        raise ConfigError(
            f"{text[:64].strip()!r} is not {wanted.partition(' such')[0]}", hint=f"write {wanted}"
        )
    return match[1], match[2].lower()
