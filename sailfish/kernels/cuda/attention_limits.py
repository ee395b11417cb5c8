"""Which models the CUDA attention kernels serve, and why they decline others. No torch."""

from __future__ import annotations

from sailfish.kernels.contract import Case, StepBounds

HEAD_DIMS = (64, 80, 96, 128, 256)
PAGE_TOKENS = (16, 32, 64)
_MOST_PARTS = 5 * 132
"""Of a head's result: on an H200 four a multiprocessor for many sequences, and one more for few."""


def rejects_paged(case: Case) -> str | None:
    """Say why decode and prefill kernels together cannot do a case, or return None."""
    most_rows = 32 if case.head_dim <= 128 else 16
    if case.dtype != "bfloat16":
        return f"made for bfloat16 activations, not {case.dtype}"
    if case.head_dim not in HEAD_DIMS:
        return (
            f"made for heads of {', '.join(map(str, HEAD_DIMS))} elements, the model's have {case.head_dim}"
        )
    if case.kv_dtype in ("int8", "fp8") and case.head_dim % 32:
        return f"an 8-bit cache needs heads of a multiple of 32 elements, the model's have {case.head_dim}"
    if case.page_tokens not in PAGE_TOKENS:
        return f"made for blocks of {', '.join(map(str, PAGE_TOKENS))} tokens, not {case.page_tokens}"
    if case.n_heads > most_rows * case.n_kv_heads:
        return f"made for up to {most_rows} heads that share a key, not {case.n_heads // case.n_kv_heads}"
    return None


def paged_bytes(case: Case, bounds: StepBounds) -> int:
    """Return what the blocks of a decode exchange, on any card."""
    rows = 8 * -(-case.n_heads // case.n_kv_heads // 8)
    return _MOST_PARTS * rows * (case.head_dim + 2) * 4
