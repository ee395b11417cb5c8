"""What the CPU's kernels cannot do, and the memory they take. No torch."""

from __future__ import annotations

from sailfish.kernels.contract import Case, StepBounds
from sailfish.kernels.cpu import library

_DTYPES = ("float32", "bfloat16")
_INT8_INPUTS = (1 << 17) - 1
"""Whose products of 8 bits always sum up within 32."""


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


def rejects_gated_int4(case: Case) -> str | None:
    """Return why a 4-bit product cannot end with the activation, or None."""
    if reason := rejects_int4(case):
        return reason
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


def int8_bytes(case: Case, bounds: StepBounds) -> int:
    """Return the workspace of an 8-bit product: activations as some CPUs need them, in 16 bits, and sums."""
    rows = min(bounds.step_tokens, case.max_rows or bounds.step_tokens)
    return rows * (2 * -(-case.n_in // 64) * 64 + 4) + 64
