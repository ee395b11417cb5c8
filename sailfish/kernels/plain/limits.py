"""Bounds of the temporary memory that the plain torch implementations take."""

from __future__ import annotations

from sailfish.kernels.contract import Case, StepBounds

CPU_ATTENTION_BYTES = 4 << 20
CUDA_ATTENTION_BYTES = 256 << 20
"""Gathered keys and values of a group of decoding sequences, and scores or masks of a block of queries."""

MASK_PAIR_BYTES = 8
"""Per (query, key) pair of a masked SDPA call: the boolean mask and its conversion to a bias."""

_ITEM_BYTES = {"float32": 4, "bfloat16": 2}
_INDEX_BYTES = 24


def score_pair_bytes(n_heads: int) -> int:
    """Per (query, key) pair of explicit attention maths: scores and weights in float32 of every head."""
    return 8 * n_heads


def token_bytes(n_kv_heads: int, head_dim: int, item_bytes: int) -> int:
    """Per gathered token: its key, its value, and the indices that find it."""
    return 2 * n_kv_heads * head_dim * item_bytes + _INDEX_BYTES


def sdpa_bytes(case: Case, bounds: StepBounds) -> int:
    """Workspace of SDPA over gathered pages."""
    return _attention_bytes(case, bounds, _ITEM_BYTES[case.dtype], MASK_PAIR_BYTES)


def math_bytes(case: Case, bounds: StepBounds) -> int:
    """Workspace of explicit attention maths, which copies what it gathers to float32."""
    item_bytes = _ITEM_BYTES[case.dtype] + 4
    return _attention_bytes(case, bounds, item_bytes, score_pair_bytes(case.n_heads))


def moe_bytes(case: Case, bounds: StepBounds) -> int:
    """Workspace of sorted routing when one expert gets every token."""
    per_row = case.n_active * (case.d_model + 24) + 4 * case.d_mlp + 2 * case.d_model
    return bounds.step_tokens * per_row * _ITEM_BYTES[case.dtype]


def none_bytes(case: Case, bounds: StepBounds) -> int:
    """No workspace."""
    return 0


def _attention_bytes(case: Case, bounds: StepBounds, item_bytes: int, pair_bytes: int) -> int:
    limit = CPU_ATTENTION_BYTES if case.target == "cpu" else CUDA_ATTENTION_BYTES
    one_sequence = bounds.context_tokens * token_bytes(case.n_kv_heads, case.head_dim, item_bytes)
    one_query = bounds.context_tokens * pair_bytes
    indices = limit
    return one_sequence + max(limit, one_query) + indices
