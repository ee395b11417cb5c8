"""The table of model families: what each model_type means, beyond the keys that all share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sailfish.base.errors import CheckpointError
from sailfish.checkpoint.files import Keys
from sailfish.checkpoint.rope import LAYER_TYPES, MAX_CONTEXT, MAX_LAYERS

Windows = Callable[[Keys, int], list[int | None]]
"""From a config and its number of layers to each layer's window in tokens."""


def _no_windows(config: Keys, n_layers: int) -> list[int | None]:
    return [None] * n_layers


def _same_window(default: int | None) -> Windows:
    """Every layer has sliding_window (Mistral, Mixtral); null means none, an absent key the default."""

    def windows(config: Keys, n_layers: int) -> list[int | None]:
        window = default if "sliding_window" not in config.values else _window(config)
        return [window] * n_layers

    return windows


def _window_if_used(config: Keys, n_layers: int) -> list[int | None]:
    """Every layer has the window, if use_sliding_window says so (Qwen3-MoE)."""
    return [_window(config) if config.flag("use_sliding_window") else None] * n_layers


def _upper_windows(config: Keys, n_layers: int) -> list[int | None]:
    """Layers from max_window_layers on have the window, if use_sliding_window says so (Qwen2, Qwen3)."""
    window = _window(config) if config.flag("use_sliding_window") else None
    first = config.integer_or("max_window_layers", 0, 2**31, 28)
    return _by_layer_type(config, n_layers, window, lambda layer: window is not None and layer >= first)


def _alternating_windows(config: Keys, n_layers: int) -> list[int | None]:
    """Even layers are local (Gemma 2)."""
    return _by_layer_type(config, n_layers, _gemma_window(config), lambda layer: layer % 2 == 0)


def _patterned_windows(config: Keys, n_layers: int) -> list[int | None]:
    """Every sixth layer is global, or as sliding_window_pattern says (Gemma 3)."""
    pattern = config.integer_or("sliding_window_pattern", 1, MAX_LAYERS, 6)
    return _by_layer_type(config, n_layers, _gemma_window(config), lambda layer: bool((layer + 1) % pattern))


def _window(config: Keys) -> int | None:
    return config.integer_or("sliding_window", 1, MAX_CONTEXT, None)


def _gemma_window(config: Keys) -> int | None:
    return 4096 if "sliding_window" not in config.values else _window(config)


def _by_layer_type(
    config: Keys, n_layers: int, window: int | None, is_local: Callable[[int], bool]
) -> list[int | None]:
    """An explicit list in `layer_types` goes before the family's rule."""
    types = config.list_or("layer_types", lambda v: v in LAYER_TYPES, f"{' or '.join(LAYER_TYPES)}")
    if types is None:
        types = [LAYER_TYPES[is_local(layer)] for layer in range(n_layers)]
    if len(types) != n_layers:
        raise CheckpointError(f"{config.where}: layer_types has {len(types)} entries for {n_layers} layers")
    if LAYER_TYPES[1] in types and window is None:
        raise CheckpointError(f"{config.where}: layer_types names sliding_attention, but no window is set")
    return [window if kind == LAYER_TYPES[1] else None for kind in types]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row; the defaults are transformers' own for keys that may be absent."""

    windows: Windows = _no_windows
    bias: Literal["none", "qkv", "attention_bias"] = "none"
    """Biases of the attention projections: none, always on q, k, v, or as the key attention_bias says."""
    bias_default: bool = False
    bias_on_output: bool = True
    """attention_bias also covers the output projection."""
    mlp_bias: bool = False
    """The key mlp_bias is obeyed."""
    head_dim: int | None = None
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rotary_frac: float = 1.0
    interleaved: bool = False
    qk_norm: bool = False
    sandwich_norms: bool = False
    is_gemma: bool = False
    """Norms scale by 1 + weight, embeddings by sqrt(D); keys hidden_activation, query_pre_attn_scalar."""
    nested_rope: bool = False
    """Local and global layers rotate differently (Gemma 3)."""
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    moe: Literal["none", "qwen3_moe", "mixtral"] = "none"


FAMILIES: dict[str, Family] = {
    "llama": Family(bias="attention_bias", mlp_bias=True),
    "mistral": Family(windows=_same_window(4096)),
    "mixtral": Family(windows=_same_window(None), norm_eps=1e-5, rope_theta=1_000_000.0, moe="mixtral"),
    "qwen2": Family(windows=_upper_windows, bias="qkv"),
    "qwen3": Family(windows=_upper_windows, bias="attention_bias", head_dim=128, qk_norm=True),
    "qwen3_moe": Family(windows=_window_if_used, bias="attention_bias", qk_norm=True, moe="qwen3_moe"),
    "glm4": Family(
        bias="attention_bias", bias_default=True, bias_on_output=False, head_dim=128,
        norm_eps=1.5625e-07, rotary_frac=0.5, interleaved=True, sandwich_norms=True,
    ),
    "gemma2": Family(
        windows=_alternating_windows, bias="attention_bias", head_dim=256, sandwich_norms=True,
        is_gemma=True, attention_softcap=50.0, logit_softcap=30.0,
    ),
    "gemma3_text": Family(
        windows=_patterned_windows, bias="attention_bias", head_dim=256, sandwich_norms=True,
        is_gemma=True, qk_norm=True, nested_rope=True,
    ),
}  # fmt: skip
