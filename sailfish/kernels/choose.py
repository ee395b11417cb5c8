"""The choice of an implementation for each op, with reasons, and its binding. No torch until bound."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from functools import lru_cache, partial
from importlib import import_module
from typing import Any

from sailfish.base.errors import ConfigError, EngineError
from sailfish.kernels.contract import TARGETS, Case, Choice, Impl, Ops, StepBounds
from sailfish.kernels.fused_table import FUSED
from sailfish.kernels.table import OPS, implementations

ROW_BUCKETS = (1, 8, 16, 32, 64, 128, 256, None)
"""Rows of activations up to which a linear's implementation is chosen apart; None: all that are more."""


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
                n_out=case.n_out,
                n_in=case.n_in,
                max_rows=case.max_rows,
                activation=case.activation,
            )
        declined.append((impl.name, reason))
    raise AssertionError(f"the reference of {case.op} rejected {case}: {reason}")


@lru_cache(maxsize=4096)  # a plan that looks for what fits asks for the same cases hundreds of times
def choose_by_rows(case: Case) -> tuple[Choice, ...]:
    """Return the choices of one linear by rows, ascending; neighbours that agree are one."""
    choices: list[Choice] = []
    for max_rows in ROW_BUCKETS:
        choice = choose(replace(case, max_rows=max_rows))
        if choices and choices[-1].implementation == choice.implementation:
            choices.pop()
        choices.append(choice)
    return tuple(choices)


def bind(choices: Iterable[Choice]) -> Ops:
    """Import each chosen implementation; EngineError unless every op is known.

    A linear dispatches by the shape of its weight and the rows of its activations; an op that the model
    does not have raises when it is called.
    """
    by_op: dict[str, list[Choice]] = {}
    for choice in choices:
        by_op.setdefault(choice.op, []).append(choice)
    if missing := NEEDED - by_op.keys():
        raise EngineError(
            f"the engine names no implementation of {', '.join(sorted(missing))}, which this version needs",
            hint="build the engine again with this version",
        )
    bound = {op: _bind(chosen) for op, chosen in by_op.items()}
    return Ops(**{field.name: bound.get(field.name) or _unused(field.name) for field in fields(Ops)})


NEEDED = frozenset({"rms_norm", "add_rms_norm", "rope_write", "attention"})
"""Ops that every decoder has."""


def bind_linear(case: Case) -> Callable[..., Any]:
    """Return one linear as it is chosen by rows, which takes rows, weight and bias."""
    return _bind(choose_by_rows(case))


def known_target(target: str) -> str:
    """Return the target, or for a newer card the newest older one, whose code it runs."""
    if target in TARGETS:
        return target
    older = [known for known in TARGETS if known != "cpu" and _number(known) <= _number(target)]
    if not older:
        raise ConfigError(f"target {target!r} is too old", hint=f"use one of {', '.join(TARGETS)}")
    return max(older, key=_number)


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


def uncapturable(choices: Iterable[Choice]) -> Choice | None:
    """Return the first choice of which no CUDA graph can be replayed for other lengths and values."""
    return next((c for c in choices if not find(c.op, c.implementation).can_capture), None)


def _bind(choices: Sequence[Choice]) -> Callable[..., Any]:
    functions = {choice.implementation: _load(choice) for choice in choices}
    if len(functions) == 1:
        return next(iter(functions.values()))
    by_shape: dict[tuple[object, ...], list[tuple[int | None, Callable[..., Any]]]] = {}
    is_fused = choices[0].op in FUSED
    for choice in choices:
        key = (choice.n_out, choice.n_in, *((choice.activation,) if is_fused else ()))
        by_shape.setdefault(key, []).append((choice.max_rows, functions[choice.implementation]))

    def norm_linear(
        ops: Ops, x: Any, norm: Any, weight: Any, bias: Any, activation: Any = None, out: Any = "plain"
    ) -> Any:
        """Call what was chosen for this weight's shape, this activation and this number of rows."""
        n_rows = len(x)
        for max_rows, function in by_shape[*weight.shape, activation or ""]:
            if max_rows is None or n_rows <= max_rows:
                return function(ops, x, norm, weight, bias, activation, out)
        raise AssertionError("the last choice of a shape takes any number of rows")

    if is_fused:
        return norm_linear

    def linear(x: Any, weight: Any, bias: Any) -> Any:
        """Call what was chosen for this weight's shape and this number of rows."""
        n_rows = len(x)
        for max_rows, function in by_shape[tuple(weight.shape)]:
            if max_rows is None or n_rows <= max_rows:
                return function(x, weight, bias)
        raise AssertionError("the last choice of a shape takes any number of rows")

    return linear


def _number(target: str) -> int:
    digits = target.removeprefix("sm_")
    return int(digits) if digits.isdigit() else 0


def _load(choice: Choice) -> Callable[..., Any]:
    impl = find(choice.op, choice.implementation)
    function = _imported(impl.entry)
    return partial(_imported(impl.adapter), function) if impl.adapter else function


def _imported(entry: str) -> Callable[..., Any]:
    module, name = entry.split(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function


def _unused(op: str) -> Callable[..., Any]:
    def unused(*_: Any) -> Any:
        raise EngineError(
            f"the engine chose no implementation of {op}", hint="build the engine again with this version"
        )

    return unused
