"""Finds the smallest changes that make a request fit, each by asking for the plan again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sailfish.base.config import EngineConfig
from sailfish.base.units import format_bytes
from sailfish.checkpoint.model_config import ModelConfig
from sailfish.hardware.profile import MIB, HardwareProfile
from sailfish.plan.draft import Draft, draft
from sailfish.plan.overlay import DeviceOverlay

_FLAGS = {
    "context_tokens": "--ctx",
    "dtype": "--dtype",
    "kv_bytes": "--kv-memory",
    "max_sequences": "--concurrency",
    "memory_bytes": "--memory",
    "step_tokens": "--step-tokens",
    "weights": "--weights",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """One change of the configuration after which the plan fits."""

    changes: tuple[tuple[str, Any], ...]
    """(EngineConfig field, value); None means "auto"."""
    config: EngineConfig
    total_bytes: int
    """The whole plan's bytes after the change."""

    @property
    def text(self) -> str:
        """The change as flags, as in "--ctx 8192 (21.3 GiB in all)"."""
        words = " ".join(f"{_FLAGS[name]} {_shown(name, value)}" for name, value in self.changes)
        return f"{words} ({format_bytes(self.total_bytes)} in all)"


def suggest(
    config: EngineConfig,
    model: ModelConfig,
    hardware: HardwareProfile,
    overlay: DeviceOverlay | None = None,
) -> list[Suggestion]:
    """Return single changes that make the configuration fit, or pairs with dtype where none alone does.

    The list is empty when it fits as it is, and when nothing makes it fit.
    """
    if draft(config, model, hardware, overlay).short_bytes <= 0:
        return []
    return suggest_for(config, model, hardware, overlay)


def suggest_for(
    config: EngineConfig,
    model: ModelConfig,
    hardware: HardwareProfile,
    overlay: DeviceOverlay | None,
) -> list[Suggestion]:
    """Do the work of `suggest` for a configuration known not to fit."""

    def ask(candidate: EngineConfig) -> Draft:
        return draft(candidate, model, hardware, overlay)

    found = _single_changes(config, ask)
    if found:
        return found
    if ask(config).plan.dtype == "float32":
        smaller = replace(config, dtype="bfloat16")
        found = [_joined(("dtype", "bfloat16"), option) for option in _single_changes(smaller, ask)]
    return found or _everything_small(config, ask)


def _single_changes(config: EngineConfig, ask: Callable[[EngineConfig], Draft]) -> list[Suggestion]:
    plan = ask(config).plan
    found: list[Suggestion | None] = []
    if plan.dtype == "float32":
        found.append(_fitting(config, {"dtype": "bfloat16"}, ask))
    if plan.formats.layers == "plain":
        found += [_fitting(config, {"weights": format}, ask) for format in ("int8", "int4")]
    if config.kv_bytes is not None:
        found.append(_fitting(config, {"kv_bytes": None}, ask))
    found.append(_largest(config, "context_tokens", plan.context_tokens, plan.page_tokens, ask))
    found.append(_largest(config, "max_sequences", plan.max_sequences, 1, ask))
    found.append(_largest(config, "step_tokens", plan.step_tokens, 64, ask))
    if config.memory_bytes is not None:
        need = plan.total_bytes
        found.append(_fitting(config, {"memory_bytes": need}, ask))
    return [option for option in found if option is not None]


def _everything_small(config: EngineConfig, ask: Callable[[EngineConfig], Draft]) -> list[Suggestion]:
    """Try the smallest sensible settings together, with the longest context that then fits."""
    small: dict[str, Any] = {"dtype": "bfloat16", "max_sequences": 1, "step_tokens": 64, "kv_bytes": None}
    base = replace(config, **small)
    option = _largest(base, "context_tokens", ask(base).plan.context_tokens + 1, 1, ask)
    if option is None:
        return []
    changes = tuple((name, value) for name, value in small.items() if getattr(config, name) != value)
    return [replace(option, changes=changes + option.changes)]


def _fitting(
    config: EngineConfig, changes: dict[str, Any], ask: Callable[[EngineConfig], Draft]
) -> Suggestion | None:
    changed = replace(config, **changes)
    answer = ask(changed)
    if answer.short_bytes > 0:
        return None
    return Suggestion(changes=tuple(changes.items()), config=changed, total_bytes=answer.plan.total_bytes)


def _largest(
    config: EngineConfig, field: str, below: int, step: int, ask: Callable[[EngineConfig], Draft]
) -> Suggestion | None:
    """Find by bisection the largest multiple of `step` under `below` that fits."""
    nothing = low = 1 if field == "context_tokens" and step == 1 else 0  # a context holds two tokens at least
    high = (below - 1) // step
    while low < high:
        middle = (low + high + 1) // 2
        changes: dict[str, Any] = {field: middle * step}
        if ask(replace(config, **changes)).short_bytes <= 0:
            low = middle
        else:
            high = middle - 1
    return _fitting(config, {field: low * step}, ask) if low > nothing else None


def _joined(change: tuple[str, Any], option: Suggestion) -> Suggestion:
    return replace(option, changes=(change, *option.changes))


def _shown(field: str, value: Any) -> str:
    if value is None:
        return "auto"
    if field == "memory_bytes":  # rounded up, else it would not fit
        return f"{-(-value // MIB)}MiB"
    return str(value)
