"""The formulas of the memory plan: bytes of weights, KV blocks, activations and workspaces.

Letters: T tokens in the step, B sequences, D model width, H query heads, K kv heads, E head width,
M mlp width, V vocabulary, X experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from sailfish.checkpoint.model_config import LayerConfig, ModelConfig
from sailfish.checkpoint.names import TensorSpec
from sailfish.plan.types import CacheSpec, Dtype

ITEM_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}
ARENA_ALIGN_BYTES = 256
"""Every tensor of the weight arena begins at a multiple of this."""
ROW_SAMPLING_BYTES = 13_000
"""Sampling parameters of one row: 1,024 bias entries of 12 bytes, 80 stop tokens of 8, and a few numbers."""


def weights_bytes(specs: Iterable[TensorSpec], dtype: Dtype) -> int:
    """Return the size of the one arena that holds all weights in `dtype`."""
    item_bytes = ITEM_BYTES[dtype]
    return sum(_aligned(prod(spec.shape) * item_bytes) for spec in specs)


def cache_specs(model: ModelConfig, dtype: Dtype) -> tuple[CacheSpec, ...]:
    """Group the layers by what of the past they see: all of it, or a window of one width."""
    groups: dict[int | None, list[int]] = {}
    for i, layer in enumerate(model.layers):
        groups.setdefault(layer.window_tokens, []).append(i)
    layer_bytes = 2 * model.n_kv_heads * model.head_dim * ITEM_BYTES[dtype]
    return tuple(
        CacheSpec(
            layers=tuple(layers),
            kind="full" if window is None else "window",
            window_tokens=window,
            dtype=dtype,
            bytes_per_token=len(layers) * layer_bytes,
        )
        for window, layers in groups.items()
    )


def activations_bytes(
    model: ModelConfig, dtype: Dtype, *, step_tokens: int, max_sequences: int
) -> tuple[int, str]:
    """Return the peak bytes of one step's live tensors, and the phase in which it is reached."""
    item = ITEM_BYTES[dtype]
    stream = step_tokens * model.d_model
    heads = step_tokens * model.n_heads * model.head_dim
    kv_heads = step_tokens * model.n_kv_heads * model.head_dim
    widen = 4 if dtype == "bfloat16" else 0  # norms and rotary embeddings work in float32
    attention = (2 * stream + 2 * heads + 3 * kv_heads + heads) * item + (heads + kv_heads) * widen
    phases = {
        "attention": attention,
        "mlp": max(_mlp_bytes(model, layer, step_tokens, item) for layer in model.layers),
        "norm": 3 * stream * item + 2 * stream * widen,
        "logits": logits_bytes(model, item, min(max_sequences, step_tokens)) + 2 * stream * item,
    }
    name = max(phases, key=lambda phase: phases[phase])
    inputs = step_tokens * 3 * 8 + max_sequences * 64
    return _aligned(phases[name] + inputs), name


def logits_bytes(model: ModelConfig, item_bytes: int, n_rows: int) -> int:
    """Return the bytes of drawing `n_rows` tokens: logits, their sorted copy, indices, probabilities."""
    sampled = n_rows * model.vocab_size
    return n_rows * model.d_model * item_bytes + sampled * (item_bytes + 4 + 4 + 8 + 4 + 4)


def rope_bytes(model: ModelConfig, context_tokens: int) -> int:
    """Return the bytes of the cos and sin tables, one pair in float32 for each distinct RoPE."""
    return sum(
        2 * context_tokens * (rope.rotary_dim // 2) * 4 for rope in {layer.rope for layer in model.layers}
    )


def table_bytes(*, max_sequences: int, context_tokens: int, page_tokens: int) -> int:
    """Return the bytes of the device table: each row's tokens and block ids (int32), sampling parameters."""
    blocks = -(-context_tokens // page_tokens)
    return max_sequences * ((context_tokens + 1 + blocks) * 4 + ROW_SAMPLING_BYTES)


def _mlp_bytes(model: ModelConfig, layer: LayerConfig, step_tokens: int, item: int) -> int:
    stream = step_tokens * model.d_model
    if layer.moe is None:
        return (3 * stream + 3 * step_tokens * model.d_mlp + step_tokens * model.d_mlp) * item
    routed = step_tokens * layer.moe.n_active
    inside = routed * (model.d_model + 4 * layer.moe.d_mlp + model.d_model) * item
    return 3 * stream * item + inside + step_tokens * layer.moe.n_experts * 8 + routed * 16


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // ARENA_ALIGN_BYTES) * ARENA_ALIGN_BYTES
