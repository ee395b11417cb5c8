"""Answers every "auto" with a reason, and accounts for every byte of the device."""

from __future__ import annotations

from sailfish.base.config import EngineConfig
from sailfish.base.errors import PlanError
from sailfish.base.units import format_bytes, format_count
from sailfish.checkpoint.model_config import ModelConfig
from sailfish.hardware.profile import HardwareProfile
from sailfish.plan.draft import Draft, draft
from sailfish.plan.overlay import DeviceOverlay
from sailfish.plan.suggest import suggest_for
from sailfish.plan.types import Plan


def make_plan(
    config: EngineConfig,
    model: ModelConfig,
    hardware: HardwareProfile,
    overlay: DeviceOverlay | None = None,
) -> Plan:
    """Return what an engine of this model allocates and obeys on this device. Pure.

    Raises ConfigError for a setting out of range and PlanError when it does not fit; the latter's
    hint names changes that do fit.
    """
    attempt = draft(config, model, hardware, overlay)
    if attempt.short_bytes > 0:
        raise _too_large(attempt, config, model, hardware, overlay)
    return attempt.plan


def _too_large(
    attempt: Draft,
    config: EngineConfig,
    model: ModelConfig,
    hardware: HardwareProfile,
    overlay: DeviceOverlay | None,
) -> PlanError:
    plan = attempt.plan
    asked = f"{model.family} in {plan.dtype} with {format_count(plan.context_tokens)} tokens of context"
    if attempt.kv_short_bytes > 0:
        message = (
            f"{asked} needs {format_bytes(plan.memory_bytes('kv_blocks'))} of KV blocks for one sequence; "
            f"kv_bytes allows {format_bytes(config.kv_bytes or 0)}"
        )
    else:
        message = (
            f"{asked} needs {format_bytes(plan.total_bytes)} on {hardware.name}; "
            f"{format_bytes(attempt.budget_bytes)} may be used ({attempt.budget_why})"
        )
    options = suggest_for(config, model, hardware, overlay)
    if options:
        hint = "any one of these fits: " + "; ".join(option.text for option in options)
    else:
        hint = f"no smaller setting fits; weights alone are {format_bytes(plan.memory_bytes('weights'))}"
    return PlanError(message, hint=hint)
