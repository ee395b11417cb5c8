"""Times a packed linear beside its dense parent on this device, where a kernel of ours reads it."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sailfish.checkpoint.formats.stored import GROUPS, keeps
from sailfish.checkpoint.model_config import ModelConfig
from sailfish.checkpoint.names import LAYER_WEIGHT, linear_modules, tensor_specs
from sailfish.compress.block import Device
from sailfish.compress.recipe import Recipe
from sailfish.compress.report import LinearSpeed
from sailfish.compress.rtn import quantise_8, quantise_int
from sailfish.compress.storing import scheme_of
from sailfish.hardware.replay import replayed_us
from sailfish.kernels import int4
from sailfish.kernels.choose import bind_linear, choose, known_target
from sailfish.kernels.contract import Case, Quantised, Weight8
from sailfish.kernels.reference.quantised import quantise
from sailfish.plan.formats import int4_sizes

ROWS = (1, 16, 256)
"""Tokens at once: one stream, a small batch, a short prompt."""
RESTORED = "restored plain weights"
"""What multiplies a linear that no kernel has as it is stored."""
_ROTATED_BYTES, _MOST_COPIES = 256 << 20, 64
"""Copies of a weight that calls rotate through, so that none but a small one is read from a cache."""
_Format = Literal["int4", "int8", "fp8"]
_KEPT: Mapping[str, _Format] = {"int3": "int4", "int4": "int4", "int8": "int8", "fp8": "fp8"}


@dataclass(frozen=True, slots=True)
class _Packing:
    """How the engine holds a rounded weight."""

    to: _Format
    group: int
    """Inputs that share a scale, in 4 bits."""
    symmetric: bool


def speeds(config: ModelConfig, recipe: Recipe, on: Device) -> list[LinearSpeed]:
    """Return a row for each shape of rounded linear and each number of tokens; without figures off a GPU.

    What an engine restores to plain weights takes the parent's time. Experts are not there, nor is what is
    stored dense, which runs as its parent does.
    """
    if recipe.layout == "dense":
        return []
    found = []
    for (n_out, n_in, packing), count in _products(config, recipe).items():
        for rows in ROWS:
            case = _case(packing, on, n_out, n_in, rows)
            chosen = choose(case)
            dense = packed = None
            if on.torch == "cuda" and (packing is None or not chosen.is_fallback):
                dense, packed = _timed(case, packing, rows)
            found.append(
                LinearSpeed(
                    n_out=n_out,
                    n_in=n_in,
                    n_linears=count,
                    rows=rows,
                    dense_us=dense,
                    packed_us=packed,
                    implementation=RESTORED if packing is None else chosen.implementation,
                )
            )
    return found


def _products(config: ModelConfig, recipe: Recipe) -> Counter[tuple[int, int, _Packing | None]]:
    """Return how many products of each (outputs, inputs, packing) the engine makes with rounded linears.

    None is of those that it restores: no kernel has them, or their linears are not stored alike.
    """
    found: Counter[tuple[int, int, _Packing | None]] = Counter()
    for spec in tensor_specs(config):
        if not LAYER_WEIGHT.fullmatch(spec.name):
            continue
        n_out, n_in = spec.shape
        rounds = [recipe.round_of(module) for module in linear_modules(spec)]
        there = [rounding for rounding in rounds if rounding is not None]
        formats = {_KEPT[rounding.to] for rounding in there}
        packing = None
        if len(there) == len(rounds) and len(formats) == 1:
            group = min(rounding.group or GROUPS[0] for rounding in there)
            if all(keeps(scheme_of(recipe, rounding)) is None for rounding in there):
                packing = _Packing(formats.pop(), group, all(rounding.symmetric for rounding in there))
        if there:
            found[n_out, n_in, packing] += 1
    return found


def _case(packing: _Packing | None, on: Device, n_out: int, n_in: int, rows: int) -> Case:
    return Case(
        op="linear" if packing is None else f"linear_{packing.to}",
        target=known_target(on.target),
        dtype=on.dtype,
        n_out=n_out,
        n_in=n_in,
        group=int4_sizes(n_out, n_in, packing.group)[2]
        if packing is not None and packing.to == "int4"
        else 0,
        max_rows=rows,
    )


def _timed(case: Case, packing: _Packing | None, rows: int) -> tuple[float, float]:
    """Return microseconds of the dense product and of the packed one; None: it is dense as well."""
    x_TI = torch.randn(rows, case.n_in, dtype=torch.bfloat16, device="cuda")
    weight_OI = torch.randn(case.n_out, case.n_in, dtype=torch.bfloat16, device="cuda")
    dense = bind_linear(
        Case(op="linear", target=case.target, dtype=case.dtype, n_out=case.n_out, n_in=case.n_in)
    )
    dense_us = _median(dense, x_TI, weight_OI, 2 * weight_OI.numel())
    if packing is None:
        return dense_us, dense_us
    weight, given = _packed(weight_OI, packing, x_TI)
    n_bytes = weight_OI.numel() // (2 if packing.to == "int4" else 1)
    return dense_us, _median(bind_linear(case), given, weight, n_bytes)


def _packed(weight_OI: Tensor, packing: _Packing, x_TI: Tensor) -> tuple[Any, Tensor | Quantised]:
    if packing.to == "int4":
        codes = quantise_int(weight_OI, packing.group, packing.symmetric, search=False)
        return int4.pack(*codes, torch.bfloat16), x_TI
    return Weight8(*quantise_8(weight_OI, packing.to)), quantise(x_TI, packing.to)


def _median(linear: Callable[..., Any], x: Any, weight: Any, n_bytes: int) -> float:
    copies = [copy.deepcopy(weight) for _ in range(max(1, min(_MOST_COPIES, _ROTATED_BYTES // n_bytes)))]
    runs = replayed_us([functools.partial(linear, x, each, None) for each in copies], runs=3)
    return sorted(runs)[1]
