"""Rows of the linear layers: 4-bit, 8-bit and 16-bit weights of the Llama-3.1-8B shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from sailfish.bench.kernels.row import Calls, Candidate, Row, candidates, n_copies
from sailfish.kernels.contract import Case, Quantised, Weight8
from sailfish.kernels.int4 import STRIP, UNIT, Int4Weight

LAYERS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
"""Outputs and inputs of one layer's linears."""
HEAD = (128256, 4096)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
_FEW_ROWS = (1, 16, 64, 256, 2048)
_DECODE_ROWS = (1, 16, 64, 256)
GROUP = 128
_OP = {"int4": "linear_int4", "bfloat16": "linear", "int8": "linear_int8", "fp8": "linear_fp8"}
_FP8 = torch.float8_e4m3fn


def linear_rows(target: str) -> Iterator[Row]:
    """Yield the rows, one weight after the other."""
    for layer, shape in LAYERS.items():
        for m in ROWS:
            yield from _rows(target, f"w4a16 {layer} M={m}", "int4", shape, m)
            yield _cublas(f"cublas bf16 {layer} M={m}", shape, m)
        for m in _FEW_ROWS:
            for weights, name in (("bfloat16", "bf16"), ("int8", "w8a8 int8"), ("fp8", "w8a8 fp8")):
                yield from _rows(target, f"{name} {layer} M={m}", weights, shape, m)
    for m in _DECODE_ROWS:
        for weights, name in (("bfloat16", "bf16"), ("int8", "w8a8 int8"), ("int4", "w4a16")):
            yield from _rows(target, f"{name} head M={m}", weights, HEAD, m)
        yield _cublas(f"cublas bf16 head M={m}", HEAD, m)


def weight_bytes(weights: str, shape: tuple[int, int]) -> int:
    """Return what a weight takes, scales included."""
    n_out, n_in = shape
    return {
        "int4": n_out * n_in // 2 + 2 * n_out * n_in // GROUP,
        "int8": n_out * n_in + 4 * n_out,
        "fp8": n_out * n_in + 4 * n_out,
        "bfloat16": 2 * n_out * n_in,
    }[weights]


def _rows(target: str, name: str, weights: str, shape: tuple[int, int], m: int) -> Iterator[Row]:
    n_out, n_in = shape
    case = Case(
        op=_OP[weights],
        target=target,
        dtype="bfloat16",
        n_out=n_out,
        n_in=n_in,
        group=GROUP if weights == "int4" else 0,
        max_rows=m,
    )
    for found in candidates(case):
        yield _row(name + found.suffix, found, weights, shape, m)


def _row(name: str, found: Candidate, weights: str, shape: tuple[int, int], m: int) -> Row:
    n_out, n_in = shape
    is_8bit = weights in ("int8", "fp8")
    return Row(
        name=name,
        implementation=found.name,
        calls=partial(_calls, found.function, weights, shape, m),
        n_bytes=weight_bytes(weights, shape) + m * n_in * (1 if is_8bit else 2) + 2 * m * n_out,
        n_flops=2.0 * m * n_out * n_in,
        is_8bit=is_8bit,
        entry=found.entry,
        can_capture=found.can_capture,
        is_chosen=found.is_chosen,
    )


def _cublas(name: str, shape: tuple[int, int], m: int) -> Row:
    plain = Candidate(name="torch", is_chosen=True, function=F.linear)
    return _row(name, plain, "bfloat16", shape, m)


def _calls(function: Callable[..., Any], weights: str, shape: tuple[int, int], m: int) -> Calls:
    n_weights = n_copies(weight_bytes(weights, shape))
    x = _activations(weights, m, shape[1])
    return [partial(function, x, _weight(weights, shape), None) for _ in range(n_weights)]


def _activations(weights: str, m: int, n_in: int) -> torch.Tensor | Quantised:
    x_TI = torch.randn(m, n_in, device="cuda", dtype=torch.bfloat16)
    if weights == "int8":
        return Quantised(_codes(m, n_in), _scales(m), torch.bfloat16)
    if weights == "fp8":
        return Quantised(x_TI.to(_FP8), _scales(m), torch.bfloat16)
    return x_TI


def _weight(weights: str, shape: tuple[int, int]) -> torch.Tensor | Int4Weight | Weight8:
    n_out, n_in = shape
    if weights == "int4":
        packed = torch.randint(
            -(2**31), 2**31 - 1, (n_out // STRIP, n_in // UNIT, 32, 4), dtype=torch.int32, device="cuda"
        )
        scale = torch.rand(n_out // STRIP, n_in // GROUP, STRIP, device="cuda").to(torch.bfloat16) / 256
        return Int4Weight(packed=packed, scale=scale, zero=None, n_out=n_out, n_in=n_in, group=GROUP)
    if weights == "int8":
        return Weight8(_codes(n_out, n_in), _scales(n_out))
    values = torch.empty(n_out, n_in, device="cuda", dtype=torch.bfloat16).normal_(std=0.02)
    return Weight8((values * 50).to(_FP8), _scales(n_out)) if weights == "fp8" else values


def _codes(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda")


def _scales(n: int) -> torch.Tensor:
    return torch.rand(n, device="cuda") / 64
