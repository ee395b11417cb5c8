"""Says what is left of a model whose parts a recipe cuts, in numbers and in its config.json. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sailfish.base.errors import ConfigError
from sailfish.checkpoint.model_config import ModelConfig
from sailfish.checkpoint.rope import LAYER_TYPES
from sailfish.compress.recipe import Cut

_HEADS_DIVIDE_WIDTH = ("llama", "gemma2", "gemma3_text")
"""transformers refuses a config of theirs whose hidden_size is no multiple of the number of heads."""
_CHANNELS = 64
"""What is left of an MLP is a multiple of this, or of as much of it as the parent's width is."""


def narrowed(config: ModelConfig, cut: Cut) -> ModelConfig:
    """Return the config with the heads and the MLP width that stay, of all layers; ConfigError if none does.

    At least the recipe's share goes. Query heads go with the key/value head that they read.
    """
    if cut.width and any(layer.moe for layer in config.layers):
        raise _refused("the width of experts is not cut", "cut layers or heads")
    n_kv = _left(config.n_kv_heads, cut.heads, 1, "key/value heads")
    n_heads = config.n_heads // config.n_kv_heads * n_kv
    if cut.heads and config.family in _HEADS_DIVIDE_WIDTH and config.d_model % n_heads:
        raise _refused(
            f"{n_heads} of {config.n_heads} heads would stay, which do not divide the width of "
            f"{config.d_model}: transformers would not load it",
            "write another share: heads: 0.5",
        )
    multiple = math.gcd(config.d_mlp, _CHANNELS)
    return replace(
        config,
        n_heads=n_heads,
        n_kv_heads=n_kv,
        d_mlp=_left(config.d_mlp, cut.width, multiple, "MLP channels"),
    )


def n_layers_left(config: ModelConfig, cut: Cut) -> int:
    """Return how many layers stay: at least the share goes; ConfigError if none would stay."""
    return _left(config.n_layers, cut.layers, 1, "layers")


def config_values(values: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Return a parent's config.json as that of `config`, which has fewer heads, channels or layers."""
    changed: dict[str, Any] = {
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_mlp,
    }
    is_local = [layer.window_tokens is not None for layer in config.layers]
    if values.get("layer_types") is not None or len(set(is_local)) > 1:
        changed["layer_types"] = [LAYER_TYPES[local] for local in is_local]
    if "mlp_only_layers" in values or "decoder_sparse_step" in values:
        changed["mlp_only_layers"] = [i for i, layer in enumerate(config.layers) if layer.moe is None]
        changed["decoder_sparse_step"] = 1
    return {**values, **changed}


def _left(n: int, share: float, multiple: int, what: str) -> int:
    """Return the largest multiple that leaves at most the rest of n."""
    left = int(n * (1 - share) / multiple + 1e-6) * multiple
    if not left:
        raise _refused(f"a share of {share:g} leaves none of {n} {what}", "write a smaller share")
    return left


def _refused(what: str, hint: str) -> ConfigError:
    return ConfigError(what, hint=hint, param="recipe")
