"""How wide the elementwise CUDA kernels go, and why they decline a case. No torch."""

from __future__ import annotations

from sailfish.kernels.contract import Case

BLOCK_THREADS = 1024
WIDEST_HEAD = 256
RAGGED_PARTS = {"norm": 1, "quantise": 4, "act_mul": 2}
"""Of rows whose width is no multiple of 8, or that are not aligned to 16 bytes."""


def most_parts(family: str, is_float32: bool) -> int:
    """Return how many times eight elements a thread of a row's block can hold without spilling."""
    return 4 if family == "quantise" or (family == "act_mul" and not is_float32) else 2


def rejects_norm(case: Case) -> str | None:
    """Say why the norms cannot do a case, or return None."""
    return _too_wide("norm", case, case.d_model)


def rejects_quantise(case: Case) -> str | None:
    """Say why the quantisation of a row cannot do a case, or return None."""
    return _too_wide("quantise", case, max(case.d_model, case.d_mlp, case.n_heads * case.head_dim))


def rejects_act_mul(case: Case) -> str | None:
    """Say why the gated activation cannot do a case, or return None."""
    return _too_wide("act_mul", case, case.d_mlp)


def rejects_rope_write(case: Case) -> str | None:
    """Say why the rotation and cache write cannot do a case, or return None."""
    if case.head_dim > WIDEST_HEAD:
        return f"made for heads of up to {WIDEST_HEAD} elements, the model's have {case.head_dim}"
    if case.head_dim % 8:
        return f"made for heads of a multiple of 8 elements, the model's have {case.head_dim}"
    if case.kv_dtype not in ("", case.dtype, "int8", "fp8"):
        return f"writes {case.dtype}, int8 or fp8, the cache is {case.kv_dtype}"
    return None


def _too_wide(family: str, case: Case, width: int) -> str | None:
    parts = RAGGED_PARTS[family] if width % 8 else most_parts(family, case.dtype == "float32")
    most = parts * BLOCK_THREADS * 8
    return None if width <= most else f"made for rows of up to {most} elements, the model's have {width}"
