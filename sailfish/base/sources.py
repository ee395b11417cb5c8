"""Where a setting comes from: default < file < `SAILFISH_*` < flag. The one reader of the environment."""

from __future__ import annotations

import difflib
import os
import tomllib
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from sailfish.base import units
from sailfish.base.config import EngineConfig, ServeConfig
from sailfish.base.errors import ConfigError

PREFIX = "SAILFISH_"
TABLES: dict[str, type] = {"engine": EngineConfig, "serve": ServeConfig}
"""The tables of a settings file; the environment knows the fields of all of them."""

_BOOLEANS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}
_DTYPES = {"float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16"}
_CHOICES = {
    "device": {"cpu": "cpu", "cuda": "cuda", "gpu": "cuda"},
    "dtype": _DTYPES,
    "weights": {**_DTYPES, "int4": "int4", "int8": "int8", "fp8": "fp8"},
    "head": {"plain": "plain", "int4": "int4", "int8": "int8", "fp8": "fp8"},
    "embedding": {"plain": "plain", "int8": "int8"},
}
_RANGES: dict[str, tuple[int, int | None]] = {"port": (0, 65535), "lag": (0, 1), "max_queue": (0, None)}
"""Whole numbers that may be zero, or have an upper end; all others are at least 1."""

Config = TypeVar("Config", EngineConfig, ServeConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """A value given on the command line, and the spelling the user typed."""

    spelling: str
    value: Any


def environment() -> Mapping[str, str]:
    """Return this process's environment."""
    return os.environ


def cache_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Return where what can be made again is kept: $XDG_CACHE_HOME/sailfish, or ~/.cache/sailfish."""
    environ = environment() if environ is None else environ
    base = environ.get("XDG_CACHE_HOME")
    if base and Path(base).is_absolute():
        return Path(base) / "sailfish"
    return Path(environ.get("HOME") or Path.home()) / ".cache" / "sailfish"


def load(
    kind: type[Config],
    *,
    file: Path | None = None,
    environ: Mapping[str, str],
    flags: Mapping[str, Flag],
) -> tuple[Config, dict[str, str]]:
    """Return the settings and, for each field, where its value came from; flags of None are not given.

    Raises ConfigError for unknown keys (naming the nearest) and for values that do not parse.
    """
    values: dict[str, Any] = {}
    origins = {field.name: "default" for field in fields(kind)}
    types = typing.get_type_hints(kind)
    for name, value, origin in (
        *_from_file(kind, file),
        *_from_environment(kind, environ),
        *((name, flag.value, flag.spelling) for name, flag in flags.items() if flag.value is not None),
    ):
        values[name] = _convert(value, types[name], name, origin)
        origins[name] = origin
    return kind(**values), origins


def _from_file(kind: type, file: Path | None) -> list[tuple[str, Any, str]]:
    if file is None:
        return []
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"settings file {file}: {error}") from error
    rows = []
    for table, settings in document.items():
        if table not in TABLES:
            raise _unknown(f"table [{table}] in {file}", table, TABLES)
        if not isinstance(settings, dict):
            raise ConfigError(f"{table} in {file} is a value; it must be a table", hint=f"write [{table}]")
        known = [field.name for field in fields(TABLES[table])]
        for name, value in settings.items():
            if name not in known:
                raise _unknown(f"key {name} of [{table}] in {file}", name, known)
            if TABLES[table] is kind:
                rows.append((name, value, f"file {file}"))
    return rows


def _from_environment(kind: type, environ: Mapping[str, str]) -> list[tuple[str, Any, str]]:
    known = {
        PREFIX + field.name.upper(): (table, field.name)
        for table in TABLES.values()
        for field in fields(table)
    }
    rows = []
    for variable in sorted(environ):
        if not variable.startswith(PREFIX):
            continue
        if variable not in known:
            raise _unknown(f"environment variable {variable}", variable, known)
        table, name = known[variable]
        if table is kind:
            rows.append((name, environ[variable], variable))
    return rows


def _unknown(what: str, key: str, known: Iterable[str]) -> ConfigError:
    names = sorted(known)
    near = difflib.get_close_matches(key, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"
    return ConfigError(f"{what} is not a setting", hint=hint, param=key)


def _convert(value: Any, annotation: Any, name: str, origin: str) -> Any:
    kinds = typing.get_args(annotation) or (annotation,)
    [kind] = [kind for kind in kinds if kind is not type(None)]
    if len(kinds) > 1 and isinstance(value, str) and value.strip().lower() == "auto":
        return None
    try:
        converted = value if kind is bool and isinstance(value, bool) else _parser(kind, name)(str(value))
        _check_range(converted, name)
    except (ValueError, ConfigError) as error:
        raise ConfigError(f"{name} from {origin}: {error}", param=name) from error
    return converted


def _parser(kind: type, name: str) -> Callable[[str], Any]:
    """Return what turns text into a field's value: the unit is the end of the field's name."""
    if kind is bool:
        return lambda text: _choice(text, _BOOLEANS)
    if name in _CHOICES:
        return lambda text: _choice(text, _CHOICES[name])
    if kind is int:
        return units.parse_bytes if name.endswith("_bytes") else units.parse_count
    return units.parse_duration_s if name.endswith("_s") else kind


def _choice(text: str, choices: Mapping[str, Any]) -> Any:
    if text.strip().lower() not in choices:
        raise ValueError(f"{text!r} is not one of {', '.join(choices)}")
    return choices[text.strip().lower()]


def _check_range(value: Any, name: str) -> None:
    if type(value) is int:
        low, high = _RANGES.get(name, (1, None))
        if value < low or (high is not None and value > high):
            wanted = f"at least {low}" if high is None else f"{low} to {high}"
            raise ValueError(f"{value} is out of range; it must be {wanted}")
