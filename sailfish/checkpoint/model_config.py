"""What a decoder is, as plain numbers: the one description that plan, artifact and models share.

Letters: L layers, D model width, H query heads, K key/value heads, E head width, M mlp width,
V vocabulary, X experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding of one layer."""

    theta: float
    rotary_dim: int
    """Leading elements of a head that rotate; the rest pass through."""
    interleaved: bool = False
    """True: pairs are (0,1), (2,3) ... (GLM). False: (i, i + rotary_dim / 2)."""
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_tokens: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    """Multiplies cos and sin (YaRN's mscale)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """Routed experts that replace a layer's MLP."""

    n_experts: int
    n_active: int
    d_mlp: int
    normalise_topk: bool
    """Softmax over all experts, keep n_active, and (if True) rescale those to sum to one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """What may differ from layer to layer."""

    rope: RopeConfig
    window_tokens: int | None = None
    """A query at position p sees keys p - window + 1 .. p; None sees all."""
    moe: MoeConfig | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeights:
    """What the weights of attention and MLP are in a checkpoint that holds them quantised."""

    format: Literal["plain", "int4", "int8", "fp8"]
    """What an engine multiplies most in; "plain": all are restored to the engine's dtype."""
    group: int
    """Inputs that share a scale, in 4 bits."""
    zero_points: bool
    """4-bit weights have a code of their own for zero in each group."""
    others: tuple[tuple[str, Literal["plain", "int4", "int8", "fp8"]], ...]
    """(name in an engine, format) of those that are in another format."""
    ordered: tuple[str, ...]
    """Engine's names of 4-bit ones whose inputs are in an order of their own (act-order)."""
    static: tuple[str, ...]
    """Engine's names of 8-bit ones whose inputs have one scale for all tokens."""
    words: str
    """How the checkpoint stores them, as in "gptq, 4 bits in groups of 128"."""
    restored: str | None
    """Why some are restored, though the checkpoint has them in fewer bits; None: none are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One decoder-only model. Families are values of these fields, never subclasses."""

    family: str
    """Hugging Face `model_type`, e.g. "llama"."""
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_mlp: int
    vocab_size: int
    context_tokens: int
    """The checkpoint's max_position_embeddings, or what YaRN makes of it."""
    norm_eps: float
    layers: tuple[LayerConfig, ...]
    dtype: Literal["float32", "bfloat16", "float16"]
    """Storage type of most weights in the checkpoint."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    tied_head: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each query and key head, before RoPE."""
    norm_plus_one: bool = False
    """RMSNorm multiplies by (1 + weight), in float32 (Gemma)."""
    sandwich_norms: bool = False
    """A second norm after attention and after the MLP, before each residual add (Gemma, GLM-4)."""
    embed_scale: float = 1.0
    """Multiplies embeddings, rounded to the activation dtype first (Gemma: sqrt(D))."""
    attention_scale: float | None = None
    """Softmax scale; None means head_dim ** -0.5."""
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    stored: StoredWeights | None = None
    """None: the checkpoint is not quantised."""

    @property
    def n_layers(self) -> int:
        """Number of decoder layers (L)."""
        return len(self.layers)

    @property
    def softmax_scale(self) -> float:
        """Scale applied to q . k."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Sampling defaults from generation_config.json, used only where a request says nothing."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
