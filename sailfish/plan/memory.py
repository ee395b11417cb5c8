"""The formulas of the memory plan: bytes of weights, KV blocks, activations and workspaces.

Letters: T tokens in the step, B sequences, D model width, H query heads, K kv heads, E head width,
M mlp width, V vocabulary, X experts.
"""

from __future__ import annotations

from collections.abc import Iterable

from sailfish.checkpoint.model_config import LayerConfig, ModelConfig
from sailfish.kernels.step_words import MAX_BARRED, MAX_BIAS, max_words
from sailfish.plan.formats import ArenaTensor
from sailfish.plan.types import CacheDtype, CacheSpec, Dtype

ITEM_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}
CACHE_ITEM_BYTES: dict[CacheDtype, int] = {"float32": 4, "bfloat16": 2, "int8": 1, "fp8": 1}
SCALE_BYTES: dict[CacheDtype, int] = {"float32": 0, "bfloat16": 0, "int8": 4, "fp8": 4}
"""Of each cached token and head."""
ARENA_ALIGN_BYTES = 256
"""Every tensor of the weight arena begins at a multiple of this: what CUDA's allocator aligns to."""
SAMPLER_CHUNK_ELEMENTS = 1 << 22
"""The sampler draws for so many logits at a time, which bounds its workspace."""
_DRAW_BYTES = 32
"""Of each logit drawn from: it, scaled, and three 64-bit states of its random number; or sorted copies."""
SCORED_ROWS = 64
"""Prompt positions whose log-probabilities are made at a time, which bounds the workspace."""
_SCORE_BYTES = 256
"""Of each scored prompt token: itself and 20 alternatives, kept until they are on the host."""
_STEP_INPUT_BYTES = 12 * 8
"""Of each token: row, position, id, slot and block, on the way to the device and there."""
ROW_SAMPLING_BYTES = 8 * MAX_BIAS + 4 * MAX_BARRED + 52
"""Sampling parameters of one row: biases and their ids, barred tokens, 13 words of other numbers."""


def weights_bytes(tensors: Iterable[ArenaTensor], dtype: Dtype) -> int:
    """Return the size of the one arena that holds all tensors, plain ones in `dtype`."""
    return sum(_aligned(tensor.n_bytes(dtype)) for tensor in tensors)


def cache_specs(model: ModelConfig, dtype: CacheDtype) -> tuple[CacheSpec, ...]:
    """Group the layers by what of the past they see: all of it, or a window of one width."""
    groups: dict[int | None, list[int]] = {}
    for i, layer in enumerate(model.layers):
        groups.setdefault(layer.window_tokens, []).append(i)
    layer_bytes = 2 * model.n_kv_heads * (model.head_dim * CACHE_ITEM_BYTES[dtype] + SCALE_BYTES[dtype])
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


def step_peak_bytes(
    model: ModelConfig,
    dtype: Dtype,
    *,
    step_tokens: int,
    max_sequences: int,
    attention_workspace_bytes: int,
    moe_workspace_bytes: int,
    linear_workspace_bytes: int,
    index_bytes: int,
) -> tuple[int, str]:
    """Return the most bytes a step holds at one moment, workspaces inside ops included, and that phase.

    `index_bytes` is what attention derives from the block table once and keeps for all layers.
    Of the linears the widest ones' workspace counts: those of the MLP and the head are never smaller.
    Temporaries of the plain ops count: norms and rotary embeddings widen bfloat16 to float32.
    """
    n_rows = min(max_sequences, step_tokens)
    phases = {
        "norm": _norm_bytes(model, dtype, step_tokens),
        "rope": _rope_step_bytes(model, dtype, step_tokens),
        "attention": _attention_bytes(model, dtype, step_tokens) + attention_workspace_bytes,
        "mlp": max(_mlp_bytes(model, layer, dtype, step_tokens) for layer in model.layers)
        + max(moe_workspace_bytes, linear_workspace_bytes),
        "logits": _logits_bytes(model, dtype, step_tokens, n_rows) + linear_workspace_bytes,
        "sampling": _sampling_bytes(model, dtype, step_tokens, n_rows),
        "prompt scores": _scoring_bytes(model, dtype, step_tokens),
    }
    phase = max(phases, key=lambda name: phases[name])
    inputs = step_tokens * _STEP_INPUT_BYTES + index_bytes
    return _aligned(phases[phase] + inputs), phase


def captured_peak_bytes(
    model: ModelConfig,
    dtype: Dtype,
    *,
    n_rows: int,
    n_tokens: int,
    attention_workspace_bytes: int,
    linear_workspace_bytes: int,
) -> int:
    """Return the most bytes that captured steps hold at one moment.

    They are decodes of n_rows sequences, and forward passes over n_tokens tokens, which are no fewer.
    """
    phases = (
        _norm_bytes(model, dtype, n_tokens),
        _rope_step_bytes(model, dtype, n_tokens),
        _attention_bytes(model, dtype, n_tokens) + attention_workspace_bytes,
        max(_mlp_bytes(model, layer, dtype, n_tokens) for layer in model.layers) + linear_workspace_bytes,
        _logits_bytes(model, dtype, n_rows, n_rows) + linear_workspace_bytes,
    )
    return _aligned(max(phases) + n_tokens * _STEP_INPUT_BYTES)


def rope_bytes(model: ModelConfig, context_tokens: int) -> int:
    """Return the bytes of the cos and sin tables, one pair in float32 for each distinct RoPE."""
    return sum(
        2 * context_tokens * (rope.rotary_dim // 2) * 4 for rope in {layer.rope for layer in model.layers}
    )


def table_bytes(*, max_sequences: int, context_tokens: int, page_tokens: int) -> int:
    """Return the bytes of the device table: each row's tokens, block ids (int32) and sampling parameters.

    One more row pads captured steps. The words that a step sends, and the draws it returns, have a place.
    """
    blocks = -(-context_tokens // page_tokens)
    row = (context_tokens + 1 + blocks) * 4 + ROW_SAMPLING_BYTES
    n_words = max_words(
        max_sequences=max_sequences, context_tokens=context_tokens, blocks_per_sequence=blocks
    )
    return (max_sequences + 1) * row + 4 * n_words + 8 * max_sequences


def _norm_bytes(model: ModelConfig, dtype: Dtype, step_tokens: int) -> int:
    """Both inputs, the last normed stream, their sum; in float32 the sum, its scaled and weighted copies."""
    item, widened = ITEM_BYTES[dtype], 0 if dtype == "float32" else 4
    return step_tokens * model.d_model * (4 * item + widened + 8)


def _rope_step_bytes(model: ModelConfig, dtype: Dtype, step_tokens: int) -> int:
    """The stream, q, k and v (and q and k normed), and a rotation: of q, or of k beside the new q."""
    item, widened = ITEM_BYTES[dtype], 0 if dtype == "float32" else 4 + ITEM_BYTES[dtype]
    rotary_dim = max(layer.rope.rotary_dim for layer in model.layers)
    turning = 8 + widened
    of_q = model.n_heads * (rotary_dim * turning + model.head_dim * item)
    of_k = (
        model.n_kv_heads * (rotary_dim * turning + model.head_dim * item)
        + model.n_heads * model.head_dim * item
    )
    normed = (model.n_heads + model.n_kv_heads) * model.head_dim * item if model.qk_norm else 0
    before = (3 * model.d_model + _qkv_width(model)) * item + normed
    return step_tokens * (before + rotary_dim * 4 + max(of_q, of_k))


def _attention_bytes(model: ModelConfig, dtype: Dtype, step_tokens: int) -> int:
    """The stream, q, k and v before and after rotation, and the output."""
    heads = model.n_heads * model.head_dim
    rotated = heads + model.n_kv_heads * model.head_dim
    return step_tokens * ITEM_BYTES[dtype] * (3 * model.d_model + _qkv_width(model) + rotated + heads)


def _mlp_bytes(model: ModelConfig, layer: LayerConfig, dtype: Dtype, step_tokens: int) -> int:
    """The stream, gate and up, the activated gate and its product with up; for experts their output."""
    item, stream = ITEM_BYTES[dtype], 3 * model.d_model * ITEM_BYTES[dtype]
    if layer.moe is None:
        return step_tokens * (stream + 4 * model.d_mlp * item)
    routing = layer.moe.n_experts * (item + 8)
    return step_tokens * (stream + model.d_model * item + routing)


def _logits_bytes(model: ModelConfig, dtype: Dtype, step_tokens: int, n_rows: int) -> int:
    """The hidden states, and logits in the model's dtype and float32 or around their soft-cap."""
    item = ITEM_BYTES[dtype]
    copies = 12 if model.logit_softcap is not None else 4 if dtype == "float32" else 4 + item
    return (step_tokens + n_rows) * model.d_model * item + n_rows * model.vocab_size * copies


def _sampling_bytes(model: ModelConfig, dtype: Dtype, step_tokens: int, n_rows: int) -> int:
    """The hidden states, logits with a copy for log-probabilities, and the draws of one chunk of rows."""
    hidden = (step_tokens + n_rows) * model.d_model * ITEM_BYTES[dtype]
    rows_drawn = min(n_rows, max(1, SAMPLER_CHUNK_ELEMENTS // model.vocab_size))
    return hidden + n_rows * model.vocab_size * 8 + rows_drawn * model.vocab_size * _DRAW_BYTES


def _scoring_bytes(model: ModelConfig, dtype: Dtype, step_tokens: int) -> int:
    """The hidden states, and the logits of some prompt positions with their log-probabilities or soft-cap."""
    copies = 12 if model.logit_softcap is not None else 8
    scored = min(SCORED_ROWS, step_tokens) * model.vocab_size * copies
    return step_tokens * (model.d_model * ITEM_BYTES[dtype] + _SCORE_BYTES) + scored


def _qkv_width(model: ModelConfig) -> int:
    return (model.n_heads + 2 * model.n_kv_heads) * model.head_dim


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // ARENA_ALIGN_BYTES) * ARENA_ALIGN_BYTES
