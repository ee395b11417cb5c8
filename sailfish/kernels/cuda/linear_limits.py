"""Why the linears on CUDA that stream or widen their weights decline a case, and what they take. No torch."""

from __future__ import annotations

from sailfish.kernels.contract import Case, StepBounds

STREAMED_BF16_ROWS = 8
STREAMED_BF16_WEIGHTS = 60_000_000
"""From here on cuBLAS streams bfloat16 as fast (on an H200 57 against 58 us for 4096 x 28672); below,
its split sums cost a launch more (34 against 31 us for 14336 x 4096). With an activation behind it, which
cuBLAS leaves to another launch, a layer of an 8B shape takes 6 us less at one row, 4.5 at eight."""
STREAMED_BF16_MORE_ROWS = 16
STREAMED_BF16_FEWER_WEIGHTS = 32_000_000
"""With more than 8 rows only smaller weights: q, k, v and o of an 8B shape take 6 us off a layer of 138 us.
Sums of more outputs, or activations of more inputs, leave too little room for weights in flight."""
STREAMED_BF16_OUTPUTS = 1024
STREAMED_INT4_ROWS = 16
"""From there on wgmma is ahead: at 32 rows 71 against 95 us for the four layers of an 8B shape on an H200."""
STREAMED_8_ROWS = 8
STREAMED_INPUTS = 8
"""Activations are read so many at a time: 16 bytes."""
NORM_WIDTH = 256
"""A norm that is a product's prologue has a multiple of so many inputs: 32 lanes read 16 bytes each."""
NORM_INPUTS = 16384
"""Of all tokens, at most: every block takes them through its registers at once."""
KERNEL_DTYPES = ("bfloat16", "float16")
_SUMMED_STRIP = 16
_FEWEST_SPLITS, _MOST_SPLITS = 8, 64
"""Ranges of inputs that a product is cut into where it is cut at all: at most, of few inputs and of many."""
_SPLIT_BYTES = 8192
"""Of all tokens' activations: so many a range, at least, fit beside the ring in any shared memory."""
_UNEVEN_BYTES, _UNEVEN_FRAC = 1 << 18, 1 / 16
"""What it takes beyond even shares that blocks own whole strips of outputs."""
_MMA_PART_BYTES = 16 << 20
"""Partial sums of the product for cards before Hopper: one tile a multiprocessor."""


def rejects_stream_bf16(case: Case) -> str | None:
    """Say why bfloat16 weights are not streamed, or return None."""
    n_weights = case.n_out * case.n_in
    if n_weights > STREAMED_BF16_WEIGHTS and not case.activation:
        return "cuBLAS streams a weight of this size as fast"
    if case.n_out < STREAMED_BF16_OUTPUTS:
        return f"{case.n_out} outputs are too few to fill the card"
    rows = STREAMED_BF16_MORE_ROWS if n_weights <= STREAMED_BF16_FEWER_WEIGHTS else STREAMED_BF16_ROWS
    return _rejects_inputs(case, STREAMED_INPUTS) or _rejects(case, rows)


def rejects_stream_int4(case: Case) -> str | None:
    """Say why 4-bit weights are not streamed, or return None."""
    return _rejects_inputs(case, STREAMED_INPUTS) or _rejects(case, STREAMED_INT4_ROWS)


def rejects_stream_8(case: Case) -> str | None:
    """Say why 8-bit weights are not streamed, or return None."""
    return _rejects_inputs(case, 2 * STREAMED_INPUTS) or _rejects(case, STREAMED_8_ROWS)


def rejects_stream_norm(case: Case) -> str | None:
    """Say why the norm is no prologue of streamed bfloat16 or 4-bit weights, or return None."""
    if case.n_in % NORM_WIDTH:
        return f"a norm of {case.n_in} inputs is no multiple of {NORM_WIDTH}"
    return _rejects(case, NORM_INPUTS // case.n_in)


def rejects_wide_int4(case: Case) -> str | None:
    """Say why 4-bit weights are not multiplied in tiles, or return None."""
    return _rejects_dtype(case)


def stream_bytes(case: Case, bounds: StepBounds) -> int:
    """Return the partial sums of blocks that cannot write to each other's shared memory.

    A bound for cards of 28 multiprocessors and more: how a product is divided is known only on the card.
    """
    if case.target == "sm_90":
        return 0
    rows = min(case.max_rows or bounds.step_tokens, bounds.step_tokens)
    tokens = 8 if rows <= 8 else 16  # more are multiplied in passes
    row_bytes = case.n_in * (1 if case.op in ("linear_int8", "linear_fp8") else 2)
    splits = _FEWEST_SPLITS
    while splits < _MOST_SPLITS and splits * _SPLIT_BYTES < tokens * row_bytes:
        splits *= 2
    even = splits * tokens * -(-case.n_out // _SUMMED_STRIP) * _SUMMED_STRIP * 4
    return int(even * (1 + _UNEVEN_FRAC)) + _UNEVEN_BYTES


def wide_int4_bytes(case: Case, bounds: StepBounds) -> int:
    """Return the copies of rows that do not begin at 16 bytes, and partial sums before Hopper."""
    padded = sum(-(-width // 8) * 8 * 2 for width in (case.n_in, case.n_out) if width % 8)
    return bounds.step_tokens * padded + (0 if case.target == "sm_90" else _MMA_PART_BYTES)


def _rejects(case: Case, max_rows: int) -> str | None:
    if reason := _rejects_dtype(case):
        return reason
    if case.max_rows is None or case.max_rows > max_rows:
        return f"made for up to {max_rows} rows"
    return None


def _rejects_dtype(case: Case) -> str | None:
    if case.dtype in KERNEL_DTYPES:
        return None
    return f"made for {' and '.join(KERNEL_DTYPES)}, the model is in {case.dtype}"


def _rejects_inputs(case: Case, at_once: int) -> str | None:
    if case.n_in % at_once == 0:
        return None
    return f"reads {at_once} inputs at a time, the weight has {case.n_in}"
