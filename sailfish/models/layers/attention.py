"""Self-attention of one layer over its paged cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sailfish.checkpoint.model_config import ModelConfig
from sailfish.kernels.contract import AttentionSpan, Ops
from sailfish.models.layers.linear import Linear
from sailfish.models.layers.norm import Norm


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfAttention:
    """Project, norm, rotate, remember, attend, project."""

    qkv: Linear
    out: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    rope_table_C2F: Tensor
    is_interleaved: bool
    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None

    @classmethod
    def of(
        cls, config: ModelConfig, layer: int, weights: Mapping[str, Tensor], rope_table_C2F: Tensor
    ) -> SelfAttention:
        """Build layer `layer` from the model's named weights."""
        name = f"layers.{layer}"
        q_norm, k_norm = (
            Norm(weights[f"{name}.{x}_norm.weight"], config.norm_eps, config.norm_plus_one)
            if config.qk_norm
            else None
            for x in "qk"
        )
        return cls(
            qkv=Linear.named(f"{name}.qkv", weights, has_bias=config.qkv_bias),
            out=Linear.named(f"{name}.o", weights, has_bias=config.o_bias),
            q_norm=q_norm,
            k_norm=k_norm,
            rope_table_C2F=rope_table_C2F,
            is_interleaved=config.layers[layer].rope.interleaved,
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            scale=config.softmax_scale,
            window=config.layers[layer].window_tokens,
            softcap=config.attention_softcap,
        )

    def __call__(
        self,
        x_TD: Tensor,
        position_T: Tensor,
        slot_T: Tensor,
        span: AttentionSpan,
        cache_2NPKE: Tensor,
        ops: Ops,
    ) -> Tensor:
        """Return the layer's attention output; writes the step's keys and values to the cache."""
        heads = (self.n_heads, self.n_kv_heads, self.n_kv_heads)
        qkv = self.qkv(x_TD, ops).view(len(x_TD), sum(heads), self.head_dim)
        q_THE, k_TKE, v_TKE = qkv.split_with_sizes(heads, 1)
        if self.q_norm is not None and self.k_norm is not None:
            q_THE, k_TKE = self.q_norm(q_THE, ops), self.k_norm(k_TKE, ops)
        q_THE, k_TKE = ops.rope(q_THE, k_TKE, self.rope_table_C2F, position_T, self.is_interleaved)
        k_cache_NPKE, v_cache_NPKE = cache_2NPKE
        ops.kv_write(k_TKE, v_TKE, k_cache_NPKE, v_cache_NPKE, slot_T)
        y_THE = ops.attention(q_THE, k_cache_NPKE, v_cache_NPKE, span, self.scale, self.window, self.softcap)
        return self.out(y_THE.flatten(1), ops)
