"""One row of the kernel measurements: what is called, on what data, and what it could cost at the least."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from sailfish.base.errors import EngineError
from sailfish.bench.named import has_kernels, is_of
from sailfish.hardware.replay import launched_us, replayed_us
from sailfish.kernels.choose import find
from sailfish.kernels.contract import Case, Impl
from sailfish.kernels.cuda.driver import launches
from sailfish.kernels.table import implementations

Calls = Sequence[Callable[[], object]]
ROTATED_BYTES = 256 << 20
"""Data that calls rotate through: several times the largest cache of a card."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Something to measure. Data is made when `calls` is asked for them."""

    name: str
    implementation: str
    calls: Callable[[], Calls]
    """Makes the data and returns one call for each copy of it."""
    n_bytes: int
    """The fewest bytes it has to move."""
    n_flops: float = 0.0
    is_8bit: bool = False
    """Whether the tensor cores multiply 8-bit numbers, at twice the rate of 16-bit ones."""
    entry: str = ""
    """The implementation's `module:function`: void if it has kernels of its own and launched none of them."""
    can_capture: bool = True
    is_chosen: bool = True
    """False: measured for comparison; an engine on this device does not use it."""

    def ideal_us(self, calibration: Mapping[str, float]) -> float | None:
        """Return what bytes and operations take at the rates that the machine was seen to reach."""
        try:
            read_us = self.n_bytes / calibration["read_gb_per_s"] / 1e3
            product_us = self.n_flops / calibration["bf16_8192_tflop_per_s"] / 1e6
        except KeyError:
            return None
        return max(read_us, product_us / 2 if self.is_8bit else product_us)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What came of a row."""

    row: Row
    runs_us: tuple[float, ...]
    launches: Mapping[str, int] = field(default_factory=dict)
    """Launches of each of our kernels by one call."""


def measure(row: Row, runs: int) -> Measured:
    """Time a row; EngineError if the kernels of its implementation were not launched."""
    calls = row.calls()
    calls[0]()  # what is compiled or allocated once
    before = launches.copy()
    calls[0]()
    by_call = dict(launches - before)
    if has_kernels(row.entry) and not any(is_of(kernel, row.entry) for kernel in by_call):
        raise EngineError(f"{row.name}: void, {row.implementation} launched no kernel of its own")
    timed = replayed_us if row.can_capture else launched_us
    return Measured(row=row, runs_us=tuple(timed(calls, runs=runs)), launches=by_call)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An implementation that takes a case."""

    name: str
    is_chosen: bool
    """Whether an engine would choose it: the first of those that take the case."""
    function: Callable[..., Any]
    entry: str = ""
    """Its `module:function`."""
    can_capture: bool = True

    @property
    def suffix(self) -> str:
        """What its rows' names end with: nothing for the one that is chosen."""
        return "" if self.is_chosen else f" ({self.name})"


def candidates(case: Case) -> list[Candidate]:
    """Return what takes a case on its device, without fallbacks and references: nobody waits for them."""
    able = [
        impl
        for impl in implementations(case.op)
        if not impl.is_fallback and impl.name != "reference" and not impl.rejects(case)
    ]
    return [
        Candidate(
            name=impl.name,
            is_chosen=i == 0,
            function=_load(impl),
            entry=impl.entry,
            can_capture=impl.can_capture,
        )
        for i, impl in enumerate(able)
    ]


def reference(op: str) -> Callable[..., Any]:
    """Return the plain torch version of an op."""
    return _load(find(op, "reference"))


def n_copies(n_bytes: int, least: int = 2) -> int:
    """Return how many copies of data make a rotation that no cache holds."""
    return max(least, math.ceil(ROTATED_BYTES / n_bytes))


def _load(impl: Impl) -> Callable[..., Any]:
    module, name = impl.entry.split(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function
