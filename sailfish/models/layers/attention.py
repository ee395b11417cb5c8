"""Self-attention of one layer over its paged cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sailfish.checkpoint.model_config import ModelConfig
from sailfish.kernels.contract import AttentionSpan, KvLayer, Ops
from sailfish.models.layers.linear import Linear, LinearWeight, dense


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfAttention:
    """Norm, rotate, remember, attend and project; who made q, k and v had its weight for that."""

    qkv: Linear
    out: Linear
    q_norm_E: Tensor | None
    k_norm_E: Tensor | None
    norm_eps: float
    norm_plus_one: bool
    rope_table_C2F: Tensor
    is_interleaved: bool
    n_heads: int
    scale: float
    window: int | None
    softcap: float | None

    @classmethod
    def of(
        cls, config: ModelConfig, layer: int, weights: Mapping[str, LinearWeight], rope_table_C2F: Tensor
    ) -> SelfAttention:
        """Build layer `layer` from the model's named weights."""
        name = f"layers.{layer}"
        q_norm_E, k_norm_E = (
            dense(weights, f"{name}.{x}_norm.weight") if config.qk_norm else None for x in "qk"
        )
        return cls(
            qkv=Linear.named(f"{name}.qkv", weights, has_bias=config.qkv_bias),
            out=Linear.named(f"{name}.o", weights, has_bias=config.o_bias),
            q_norm_E=q_norm_E,
            k_norm_E=k_norm_E,
            norm_eps=config.norm_eps,
            norm_plus_one=config.norm_plus_one,
            rope_table_C2F=rope_table_C2F,
            is_interleaved=config.layers[layer].rope.interleaved,
            n_heads=config.n_heads,
            scale=config.softmax_scale,
            window=config.layers[layer].window_tokens,
            softcap=config.attention_softcap,
        )

    def __call__(
        self,
        qkv_TX: Tensor,
        position_T: Tensor,
        slot_T: Tensor,
        span: AttentionSpan,
        kv: KvLayer,
        ops: Ops,
    ) -> Tensor:
        """Return the layer's attention output; writes the step's keys and values to the cache."""
        q_THE = ops.rope_write(
            qkv_TX,
            self.n_heads,
            self.q_norm_E,
            self.k_norm_E,
            self.norm_eps,
            self.norm_plus_one,
            self.rope_table_C2F,
            position_T,
            self.is_interleaved,
            kv,
            slot_T,
        )
        y_THE = ops.attention(q_THE, kv, span, self.scale, self.window, self.softcap)
        return self.out(y_THE.flatten(1), ops)
