"""Times a packed linear beside its dense parent on this device, where a kernel of ours reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sailfish.checkpoint.model_config import ModelConfig
from sailfish.compress.block import Device
from sailfish.compress.recipe import Recipe, Round
from sailfish.compress.report import LinearSpeed
from sailfish.compress.rtn import Format8, quantise_8, quantise_int
from sailfish.hardware.replay import replayed_us
from sailfish.kernels import int4
from sailfish.kernels.choose import bind_linear, choose, known_target
from sailfish.kernels.contract import Case, Quantised, Weight8
from sailfish.kernels.reference.quantised import quantise
from sailfish.plan.formats import int4_sizes

ROWS = (1, 16, 256)
"""Tokens at once: one stream, a small batch, a short prompt."""
_ROTATED_BYTES = 256 << 20
"""Copies of a weight that calls rotate through, so that none is read from a cache."""


def speeds(config: ModelConfig, recipe: Recipe, on: Device) -> list[LinearSpeed]:
    """Return a row for each shape of linear and each number of tokens; without figures off a GPU.

    Only rounded linears of plain blocks are there: what is stored dense runs as its parent does.
    """
    if recipe.layout == "dense" or recipe.round is None or recipe.round.to == "int3":
        return []
    found = []
    for (n_out, n_in), count in _shapes(config).items():
        for rows in ROWS:
            case = _case(recipe.round, on, n_out, n_in, rows)
            chosen = choose(case)
            is_timed = on.torch == "cuda" and not chosen.is_fallback
            dense, packed = _timed(case, recipe.round, rows) if is_timed else (None, None)
            found.append(
                LinearSpeed(
                    n_out=n_out,
                    n_in=n_in,
                    n_linears=count,
                    rows=rows,
                    dense_us=dense,
                    packed_us=packed,
                    implementation=chosen.implementation,
                )
            )
    return found


def total_us(found: Sequence[LinearSpeed], rows: int) -> tuple[float, float] | None:
    """Return what all linears take, (dense, packed), for so many tokens; None where one has no figure."""
    dense = packed = 0.0
    for speed in found:
        if speed.rows != rows:
            continue
        if speed.dense_us is None or speed.packed_us is None:
            return None
        dense += speed.dense_us * speed.n_linears
        packed += speed.packed_us * speed.n_linears
    return (dense, packed) if packed else None


def _shapes(config: ModelConfig) -> Counter[tuple[int, int]]:
    """Return how many linears of each shape the engine multiplies with."""
    d, width = config.d_model, config.n_heads * config.head_dim
    shapes: Counter[tuple[int, int]] = Counter()
    for layer in config.layers:
        shapes[(config.n_heads + 2 * config.n_kv_heads) * config.head_dim, d] += 1
        shapes[d, width] += 1
        if layer.moe is None:
            shapes[2 * config.d_mlp, d] += 1
            shapes[d, config.d_mlp] += 1
    return shapes


def _case(rounding: Round, on: Device, n_out: int, n_in: int, rows: int) -> Case:
    group = 0
    if rounding.to == "int4":
        group = int4_sizes(n_out, n_in, rounding.group or n_in)[2]
    return Case(
        op=f"linear_{rounding.to}",
        target=known_target(on.target),
        dtype=on.dtype,
        n_out=n_out,
        n_in=n_in,
        group=group,
        max_rows=rows,
    )


def _timed(case: Case, rounding: Round, rows: int) -> tuple[float, float]:
    """Return microseconds of the dense product and of the packed one."""
    x_TI = torch.randn(rows, case.n_in, dtype=torch.bfloat16, device="cuda")
    weight_OI = torch.randn(case.n_out, case.n_in, dtype=torch.bfloat16, device="cuda")
    dense = bind_linear(
        Case(op="linear", target=case.target, dtype=case.dtype, n_out=case.n_out, n_in=case.n_in)
    )
    packed = bind_linear(case)
    weight, given = _packed(weight_OI, rounding, x_TI)
    n_copies = max(1, min(8, _ROTATED_BYTES // (2 * weight_OI.numel())))
    copies = [weight_OI.clone() for _ in range(n_copies)]
    return _median(dense, x_TI, copies), _median(packed, given, [weight])


def _packed(weight_OI: Tensor, rounding: Round, x_TI: Tensor) -> tuple[Any, Tensor | Quantised]:
    if rounding.to == "int4":
        codes = quantise_int(weight_OI, rounding.group, rounding.symmetric, search=False)
        return int4.pack(*codes, torch.bfloat16), x_TI
    to: Format8 = "fp8" if rounding.to == "fp8" else "int8"
    return Weight8(*quantise_8(weight_OI, to)), quantise(x_TI, to)


def _median(linear: Callable[..., Any], x: Any, weights: Sequence[Any]) -> float:
    calls = [lambda weight=weight: linear(x, weight, None) for weight in weights]
    runs = sorted(replayed_us(calls, runs=3))
    return runs[1]
