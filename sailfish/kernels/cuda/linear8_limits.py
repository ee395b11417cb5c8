"""Why the tiled products of 8 bits, and of bfloat16, decline a case on CUDA, and what they take. No torch."""

from __future__ import annotations

from sailfish.kernels.contract import Case, StepBounds

INT_MM_ROWS = 2048
"""Rows whose integer sums are held at a time."""
FEWEST_INT_MM_ROWS = 32
"""torch._int_mm refuses 16 rows and less."""
LIBRARY_BF16_ROWS = 256
"""Up to so many rows cuBLAS' product and the activation are as fast or faster (192 rows of an 8B shape's gate
and up take 83 us on an H200, gated 97); from 512 on the gated one is: 2048 rows take 724 instead of 751."""
_FLOAT8_TARGETS = ("sm_89", "sm_90")


def rejects_wide(case: Case) -> str | None:
    """Say why the Hopper kernel cannot do a case, or return None."""
    if case.target != "sm_90":
        return f"made for Hopper, sm_90, the target is {case.target}"
    if case.dtype != "bfloat16":
        return f"returns bfloat16, the model is in {case.dtype}"
    return _rejects_shape(case, inputs=16, outputs=8)


def rejects_wide_bf16(case: Case) -> str | None:
    """Say why the Hopper kernel does not multiply bfloat16, or return None."""
    if case.max_rows is not None and case.max_rows <= LIBRARY_BF16_ROWS:
        return f"of up to {LIBRARY_BF16_ROWS} rows cuBLAS' product is as fast or faster"
    return rejects_wide(case)


def rejects_int_mm(case: Case) -> str | None:
    """Say why torch's integer product cannot do a case, or return None."""
    return _rejects_shape(case, inputs=8, outputs=8)


def rejects_scaled_mm(case: Case) -> str | None:
    """Say why torch's product of float8 cannot do a case, or return None."""
    if case.target not in _FLOAT8_TARGETS:
        return f"{case.target} has no units for float8"
    if case.dtype != "bfloat16":
        return f"returns bfloat16, the model is in {case.dtype}"
    return _rejects_shape(case, inputs=16, outputs=16)


def int_mm_bytes(case: Case, bounds: StepBounds) -> int:
    """Return the workspace of torch's integer product: sums of some rows, and rows padded to the fewest."""
    rows = max(FEWEST_INT_MM_ROWS, min(bounds.step_tokens, INT_MM_ROWS))
    return rows * case.n_out * 4 + FEWEST_INT_MM_ROWS * case.n_in


def dequantised_bytes(case: Case, bounds: StepBounds) -> int:
    """Return the workspace of the product of widened operands: those, and the result in float32 twice."""
    item_bytes = 4 if case.dtype == "float32" else 2
    operands = (case.n_out + bounds.step_tokens) * case.n_in
    return operands * item_bytes + bounds.step_tokens * case.n_out * (item_bytes + 8)


def _rejects_shape(case: Case, *, inputs: int, outputs: int) -> str | None:
    if case.n_in % inputs:
        return f"made for a multiple of {inputs} inputs, the weight has {case.n_in}"
    if case.n_out % outputs:
        return f"made for a multiple of {outputs} outputs, the weight has {case.n_out}"
    return None
