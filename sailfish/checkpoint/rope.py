"""Read rotary-embedding settings: rope_theta and rope_scaling, or the newer rope_parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

from sailfish.base.errors import CheckpointError, UnsupportedModelError
from sailfish.checkpoint.files import Keys, shown
from sailfish.checkpoint.model_config import RopeConfig

LAYER_TYPES = ("full_attention", "sliding_attention")
MAX_CONTEXT = 2**27
MAX_LAYERS = 1024

_SCALINGS: dict[str, Literal["none", "linear", "llama3", "yarn"]] = {
    "default": "none",
    "linear": "linear",
    "llama3": "llama3",
    "yarn": "yarn",
}
_SHARED = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_KNOWN = {
    "none": _SHARED,
    "linear": _SHARED | {"factor"},
    "llama3": _SHARED | {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": _SHARED
    | {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"}
    | {"mscale", "mscale_all_dim", "truncate", "finetuned"},
}


def rope_config(
    config: Keys,
    params: Keys,
    *,
    theta_key: str = "rope_theta",
    theta: float,
    head_dim: int,
    interleaved: bool,
    rotary_frac: float,
) -> RopeConfig:
    """Read one set of rope parameters; `theta` and `rotary_frac` are the family's defaults."""
    kind = params.text_or("rope_type", params.text_or("type", "default"))
    if kind not in _SCALINGS:
        raise UnsupportedModelError(
            f"{params.where}: rope_type is {shown(kind)}; supported are {', '.join(_SCALINGS)}",
            param="rope_type",
        )
    scaling = _SCALINGS[kind]
    if unknown := sorted(params.values.keys() - _KNOWN[scaling] - set(LAYER_TYPES)):
        raise UnsupportedModelError(
            f"{params.where}: {unknown[0]} is {shown(params.values[unknown[0]])}; "
            f"rope_type {kind} has no such key",
            param=unknown[0],
        )
    theta = params.number_or("rope_theta", 1.0, 1e12, config.number_or(theta_key, 1.0, 1e12, theta))
    factor, context, original = 1.0, stated_context(config), 0
    if scaling in ("llama3", "yarn"):
        original = params.integer_or("original_max_position_embeddings", 1, MAX_CONTEXT, context)
        original = config.integer_or("original_max_position_embeddings", 1, MAX_CONTEXT, original)
    if scaling == "yarn":
        factor = params.number_or("factor", 1.0, 1e6, context / original)
    elif scaling != "none":
        factor = params.number("factor", 1.0, 1e6)
    low, high = 1.0, 4.0
    if scaling == "llama3":
        low, high = params.number("low_freq_factor", 1e-6, 1e6), params.number("high_freq_factor", 1e-6, 1e6)
        if low >= high:
            raise CheckpointError(
                f"{params.where}: low_freq_factor {low:g} must be below high_freq_factor {high:g}"
            )
    return RopeConfig(
        theta=theta,
        rotary_dim=_rotary_dim(config, params, head_dim, rotary_frac),
        interleaved=interleaved,
        scaling=scaling,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_context_tokens=original,
        beta_fast=params.number_or("beta_fast", 0.0, 1e6, 32.0) or 32.0,
        beta_slow=params.number_or("beta_slow", 0.0, 1e6, 1.0) or 1.0,
        attention_factor=_attention_factor(params, factor) if scaling == "yarn" else 1.0,
    )


def stated_context(config: Keys) -> int:
    """Return max_position_embeddings; a model generates only where a prompt leaves room for a token."""
    return config.integer("max_position_embeddings", 2, MAX_CONTEXT)


def context_tokens(config: Keys, ropes: Iterable[RopeConfig]) -> int:
    """Return the longest context: what the config states, or what YaRN stretches the original one to.

    Published configs state either length (Qwen2.5: 32768 beside a factor of 4; DeepSeek-V3: all 163840).
    """
    stretched = [rope.factor * rope.original_context_tokens for rope in ropes if rope.scaling == "yarn"]
    longest = max([stated_context(config), *map(int, stretched)])
    if longest > MAX_CONTEXT:
        raise CheckpointError(
            f"{config.where}: YaRN's factor makes a context of {longest} tokens; "
            f"it must be at most {MAX_CONTEXT}",
            param="factor",
        )
    return longest


def _rotary_dim(config: Keys, params: Keys, head_dim: int, rotary_frac: float) -> int:
    key = "partial_rotary_factor"
    frac = params.number_or(key, 0.0, 1.0, config.number_or(key, 0.0, 1.0, rotary_frac))
    if frac != 1.0 and rotary_frac == 1.0:
        raise UnsupportedModelError(
            f"{config.where}: partial_rotary_factor is {frac:g}; this family rotates whole heads", param=key
        )
    rotary_dim = int(head_dim * frac)
    if rotary_dim < 2 or rotary_dim % 2:
        raise CheckpointError(
            f"{config.where}: {frac:g} of head_dim {head_dim} makes {rotary_dim} rotating elements; "
            "they must be an even number of at least 2"
        )
    return rotary_dim


def _attention_factor(params: Keys, factor: float) -> float:
    """YaRN's scale of cos and sin (Peng et al. 2023, section 3.4), as transformers resolves it."""
    if not params.flag("truncate", True):
        raise UnsupportedModelError(
            f"{params.where}: truncate is false; only true is supported", param="truncate"
        )
    given = params.number_or("attention_factor", 1e-6, 1e6, None)
    if given is not None:
        return given
    mscale = params.number_or("mscale", 0.0, 1e6, 0.0)
    mscale_all_dim = params.number_or("mscale_all_dim", 0.0, 1e6, 0.0)
    if mscale and mscale_all_dim:
        return _mscale(factor, mscale) / _mscale(factor, mscale_all_dim)
    return _mscale(factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0
