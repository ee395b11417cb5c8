"""The choice of an implementation for each op, with reasons, and its binding. No torch until bound."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from sailfish.base.errors import EngineError
from sailfish.kernels.contract import Case, Choice, Impl, Ops, StepBounds
from sailfish.kernels.table import OPS, implementations


def choose(case: Case) -> Choice:
    """Return the first implementation in order of preference that does not reject the case."""
    declined: list[tuple[str, str]] = []
    for impl in implementations(case.op):
        reason = impl.rejects(case)
        if reason is None:
            return Choice(
                op=case.op,
                implementation=impl.name,
                why=impl.why,
                declined=tuple(declined),
                is_fallback=impl.is_fallback,
            )
        declined.append((impl.name, reason))
    raise AssertionError(f"the reference of {case.op} rejected {case}: {reason}")


def bind(choices: Iterable[Choice]) -> Ops:
    """Import each chosen implementation; EngineError unless each op has a known one."""
    bound: dict[str, Any] = {}
    for choice in choices:
        module, name = find(choice.op, choice.implementation).entry.split(":")
        bound[choice.op] = getattr(import_module(module), name)
    missing = OPS.keys() - bound.keys()
    if missing:
        raise EngineError(
            f"the engine names no implementation of {', '.join(sorted(missing))}, which this version needs",
            hint="build the engine again with this version",
        )
    return Ops(**bound)


def find(op: str, implementation: str) -> Impl:
    """Return a named implementation; EngineError if this version of Sailfish has no such one."""
    for impl in implementations(op) if op in OPS else ():
        if impl.name == implementation:
            return impl
    raise EngineError(
        f"the engine asks for implementation {implementation!r} of op {op!r}, which this version lacks",
        hint="build the engine again with this version",
    )


def workspace_bytes(case: Case, choice: Choice, bounds: StepBounds) -> int:
    """Return the temporary device memory that the chosen implementation takes in one call, at most."""
    return find(case.op, choice.implementation).workspace_bytes(case, bounds)
