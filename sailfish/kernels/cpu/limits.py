"""What the CPU's kernels cannot do, and the memory they take. No torch."""

from __future__ import annotations

from sailfish.kernels.contract import Case, StepBounds
from sailfish.kernels.cpu import library

_DTYPES = ("float32", "bfloat16")
_INT8_INPUTS = (1 << 17) - 1
"""Whose products of 8 bits always sum up within 32."""
_BF16_ROWS = 32
"""Products of 2048 x 2048 and 8192 x 2048 on a Zen 4 core take torch, which uses AVX512-BF16 too, 1.2 to 1.7
times as long at one row, 1.1 at 32 and 0.9 to 1.0 at 128. Without it torch takes as long at one row (0.9 to
1.3 where memory counts) and 2 to 3 times as long at more."""


def rejects_library(case: Case) -> str | None:
    """Return why no kernel of the library can do a case, or None."""
    if case.target != "cpu":
        return f"made for the CPU, the target is {case.target}"
    if case.dtype not in _DTYPES:
        return f"reads float32 and bfloat16, not {case.dtype}"
    return library.unavailable()


def rejects_int4(case: Case) -> str | None:
    """Return why a 4-bit weight cannot be multiplied, or None."""
    if reason := rejects_library(case):
        return reason
    return None if case.layout == "lanes" else "the weight lies as a GPU's tensor cores read it"


def rejects_gated(case: Case) -> str | None:
    """Return why a product cannot end with the activation, or None."""
    if not case.activation:
        return "there is no activation behind this product"
    return f"gate and up do not take turns of 8 in {case.n_out} outputs" if case.n_out % 16 else None


def int4_bytes(case: Case, bounds: StepBounds) -> int:
    """Return the workspace of a 4-bit product: activations in 8 bits, with a scale and a sum of each run."""
    rows = min(bounds.step_tokens, case.max_rows or bounds.step_tokens)
    width = -(-case.n_in // case.group) * case.group
    return rows * (width + 8 * -(-width // min(case.group, 128)))


def rejects_int8(case: Case) -> str | None:
    """Return why an 8-bit weight cannot be multiplied, or None."""
    if reason := rejects_library(case):
        return reason
    return None if case.n_in <= _INT8_INPUTS else f"{case.n_in} products may not sum up within 32 bits"


def rejects_bf16(case: Case) -> str | None:
    """Return why a bfloat16 weight is not multiplied, or None."""
    if reason := rejects_library(case):
        return reason
    if case.dtype != "bfloat16":
        return f"reads bfloat16 weights, not {case.dtype}"
    if "avx512_bf16" not in library.levels():
        return "of one row torch's product is as fast" if case.max_rows == 1 else None
    if case.max_rows is None or case.max_rows > _BF16_ROWS:
        return f"with more rows than {_BF16_ROWS} torch's product is faster"
    return None


def bf16_bytes(case: Case, bounds: StepBounds) -> int:
    """Return the workspace of a bfloat16 product: activations as some CPUs need them, in float32."""
    rows = min(bounds.step_tokens, case.max_rows or bounds.step_tokens)
    return rows * 4 * -(-case.n_in // 32) * 32 + 64


def int8_bytes(case: Case, bounds: StepBounds) -> int:
    """Return the workspace of an 8-bit product: activations as some CPUs need them, in 16 bits, and sums."""
    rows = min(bounds.step_tokens, case.max_rows or bounds.step_tokens)
    return rows * (2 * -(-case.n_in // 64) * 64 + 4) + 64
