"""What the device forces below what the checkpoint offers, and its refusal where the user asked for that."""

from __future__ import annotations

from collections.abc import Iterable

from sailfish.base.config import EngineConfig
from sailfish.base.errors import PlanError
from sailfish.kernels.contract import Choice
from sailfish.plan.types import Plan


def downgrades(plan: Plan, ops: Iterable[Choice]) -> list[str]:
    """Return every downgrade in words, as in "dtype is bfloat16: the checkpoint stores float16".

    A default that is smaller than it could be, such as a CPU's context, is none.
    """
    settings = [f"{d.name} is {d.active}: {d.why}" for d in plan.decisions if d.is_downgrade]
    slower = [
        f"{choice.op} is {choice.implementation}: {choice.declined[0][1] if choice.declined else choice.why}"
        for choice in ops
        if choice.is_fallback
    ]
    return settings + list(dict.fromkeys(slower))


def refuse_downgrades(config: EngineConfig, plan: Plan, ops: Iterable[Choice]) -> list[str]:
    """Return the downgrades; with `config.strict` raise PlanError if there is one."""
    found = downgrades(plan, ops)
    if config.strict and found:
        hint = "ask for that value by name, or leave --strict out"
        raise PlanError(f"--strict allows no downgrade: {'; '.join(found)}", hint=hint)
    return found
