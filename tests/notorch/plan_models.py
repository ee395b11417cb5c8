"""Model configurations of known checkpoints, for plans; and a plan."""

from __future__ import annotations

from dataclasses import replace

from sailfish.checkpoint.model_config import LayerConfig, ModelConfig, MoeConfig, RopeConfig
from sailfish.plan.types import CacheSpec, Decision, MemoryLine, Plan, WeightFormats

_ROPE = RopeConfig(theta=500_000.0, rotary_dim=128)

LLAMA_8B = ModelConfig(
    family="llama",
    d_model=4096,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    d_mlp=14336,
    vocab_size=128256,
    context_tokens=131072,
    norm_eps=1e-5,
    layers=(LayerConfig(rope=_ROPE),) * 32,
    dtype="bfloat16",
)
"""Llama-3.1-8B: 8,030,261,248 parameters in its model card's safetensors index."""

BOOKS_4M = ModelConfig(
    family="llama",
    d_model=256,
    n_heads=4,
    n_kv_heads=2,
    head_dim=64,
    d_mlp=768,
    vocab_size=8192,
    context_tokens=2048,
    norm_eps=1e-5,
    layers=(LayerConfig(rope=RopeConfig(theta=10_000.0, rotary_dim=64)),) * 2,
    dtype="bfloat16",
    tied_head=True,
)

LOCAL_GLOBAL = replace(
    BOOKS_4M,
    layers=(
        LayerConfig(rope=RopeConfig(theta=10_000.0, rotary_dim=64), window_tokens=512),
        LayerConfig(rope=RopeConfig(theta=1e6, rotary_dim=64)),
        LayerConfig(rope=RopeConfig(theta=10_000.0, rotary_dim=64), window_tokens=512),
    ),
)

EXPERTS = replace(
    BOOKS_4M,
    layers=(
        LayerConfig(
            rope=RopeConfig(theta=10_000.0, rotary_dim=64),
            moe=MoeConfig(n_experts=8, n_active=2, d_mlp=128, normalise_topk=True),
        ),
    )
    * 2,
)

PLAN = Plan(
    target="cpu",
    device="cpu",
    dtype="float32",
    formats=WeightFormats(),
    kv_dtype="float32",
    page_tokens=16,
    context_tokens=128,
    max_sequences=4,
    step_tokens=64,
    mixed_tokens=32,
    max_queue=16,
    n_blocks=32,
    lag=0,
    prefix_cache=True,
    graph_buckets=(),
    graph_chunks=(),
    cache=(CacheSpec(layers=(0, 1), kind="full", window_tokens=None, dtype="float32", bytes_per_token=256),),
    memory=(MemoryLine(name="weights", bytes=1024, why="one arena"),),
    decisions=(Decision(name="dtype", requested="auto", active="float32", why="small"),),
)
"""A small plan for a CPU, of no model in particular."""
