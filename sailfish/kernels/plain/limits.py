"""Bounds of the temporary memory that the plain torch implementations take."""

from __future__ import annotations

from dataclasses import dataclass

from sailfish.kernels.contract import Case, StepBounds

CPU_ATTENTION_BYTES = 4 << 20
CUDA_ATTENTION_BYTES = 256 << 20
"""Gathered keys and values of a group of decoding sequences, and scores or masks of a block of queries."""

MEMO_FRACTION = 1 / 8
"""Of that, again, for the indices that all layers of a step share."""
INDEX_BYTES = 9
"""Per gathered token: its slot (int64) and whether it is there."""
_INDEXING_BYTES = 24
"""The same while it is being made."""

_WIDENED_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Quantised weights that are float32 at one moment: in the CPU's caches, or enough to fill a GPU."""
_WIDENING_BYTES = 16
"""Of each of them: itself in float32 and what it is made from."""

_ITEM_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Way:
    """What a way to compute attention takes."""

    widens: bool
    """It copies keys and values to float32, one of the two at a time, twice."""
    head_pair_bytes: int
    """Per (query, key) pair of each head."""
    mask_pair_bytes: int
    """Per (query, key) pair."""
    has_causal: bool
    """It needs no mask where plain causal attention is meant."""

    def pair_bytes(self, n_heads: int) -> int:
        """Return the bytes per (query, key) pair."""
        return self.head_pair_bytes * n_heads + self.mask_pair_bytes

    def token_bytes(self, n_kv_heads: int, head_dim: int, item_bytes: int) -> int:
        """Return the bytes per gathered token."""
        return 2 * n_kv_heads * head_dim * (item_bytes + 4 * self.widens) + _INDEXING_BYTES


SDPA = Way(widens=False, head_pair_bytes=0, mask_pair_bytes=8, has_causal=True)
"""A boolean mask and its conversion to a bias."""
MATH = Way(widens=True, head_pair_bytes=8, mask_pair_bytes=2, has_causal=False)
"""Scores and weights in float32; a mask and its inverse."""


def sdpa_bytes(case: Case, bounds: StepBounds) -> int:
    """Return the workspace of SDPA over gathered pages."""
    return _attention_bytes(case, bounds, SDPA)


def math_bytes(case: Case, bounds: StepBounds) -> int:
    """Return the workspace of explicit maths over gathered pages."""
    return _attention_bytes(case, bounds, MATH)


def moe_bytes(case: Case, bounds: StepBounds) -> int:
    """Return the workspace of sorted routing when one expert gets every token."""
    per_row = case.n_active * (case.d_model + 24) + 4 * case.d_mlp + 2 * case.d_model
    return bounds.step_tokens * per_row * _ITEM_BYTES[case.dtype]


def widened_rows(n_in: int, device: str) -> int:
    """Return how many rows of a quantised weight are widened at a time, whole strips of 64."""
    return max(64, _WIDENED_ELEMENTS[device] // n_in // 64 * 64)


def widening_bytes(case: Case, bounds: StepBounds) -> int:
    """Return the workspace of a linear that widens its weight: those rows, activations and outputs."""
    n_rows = min(case.n_out, widened_rows(case.n_in, "cpu" if case.target == "cpu" else "cuda"))
    rows = min(bounds.step_tokens, case.max_rows or bounds.step_tokens)
    return n_rows * case.n_in * _WIDENING_BYTES + 4 * rows * (case.n_in + n_rows)


def quantise_bytes(case: Case, bounds: StepBounds) -> int:
    """Return the workspace of plain quantisation of the widest activations."""
    widest = max(case.d_mlp, case.d_model, case.n_heads * case.head_dim)
    return bounds.step_tokens * widest * _WIDENING_BYTES


def none_bytes(case: Case, bounds: StepBounds) -> int:
    """Return that there is no workspace."""
    return 0


def _attention_bytes(case: Case, bounds: StepBounds, way: Way) -> int:
    limit = CPU_ATTENTION_BYTES if case.target == "cpu" else CUDA_ATTENTION_BYTES
    item_bytes = _ITEM_BYTES[case.dtype]
    token_bytes = way.token_bytes(case.n_kv_heads, case.head_dim, item_bytes)
    one_sequence = bounds.context_tokens * token_bytes
    one_query = bounds.context_tokens * way.pair_bytes(case.n_heads)
    outputs = bounds.step_tokens * case.n_heads * case.head_dim * (item_bytes + 12 * way.widens)
    return one_sequence + max(limit, one_query) + outputs + int(limit * MEMO_FRACTION)
