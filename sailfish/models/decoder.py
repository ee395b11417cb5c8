"""The decoder: one-device maths over bound ops, for every family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sailfish.checkpoint.model_config import ModelConfig
from sailfish.kernels.contract import AttentionSpan, KvLayer, Ops, Quantised, Weight8
from sailfish.models.layers.attention import SelfAttention
from sailfish.models.layers.linear import Linear, LinearWeight, dense
from sailfish.models.layers.mlp import Experts, Mlp, feed_forward
from sailfish.models.layers.norm import Norm, add_and_norm
from sailfish.models.layers.rope import rope_table


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """The tokens of one step, on the device, in the order of the span's sequences."""

    token_T: Tensor
    """int64."""
    position_T: Tensor
    """int64, of each token in its sequence."""
    slot_T: Tensor
    """int64, block * P + offset: where each token's key and value go."""
    span: AttentionSpan

    @classmethod
    def of_window(cls, token_T: Tensor, block_1W: Tensor) -> StepInputs:
        """Return a whole sequence on an empty cache; block_1W: int32, the blocks 0, 1, ... in order."""
        device, n_tokens = block_1W.device, len(token_T)
        span = AttentionSpan(
            block_table_RW=block_1W,
            row_B=torch.zeros(1, dtype=torch.int32, device=device),
            query_start=(0, n_tokens),
            kv_len=(n_tokens,),
            kv_len_B=torch.tensor([n_tokens], dtype=torch.int32, device=device),
            query_start_B1=torch.tensor([0, n_tokens], dtype=torch.int32, device=device),
        )
        position_T = torch.arange(n_tokens, device=device)
        # Blocks lie in order, so that a token's slot is its position.
        return cls(token_T=token_T, position_T=position_T, slot_T=position_T, span=span)


@dataclass(frozen=True, slots=True)
class KvCache:
    """Keys and values of all layers; blocks are shared by the layers."""

    layers: tuple[KvLayer, ...]

    @classmethod
    def of(cls, kv_L2NPKE: Tensor, scale_L2NPK: Tensor | None = None) -> KvCache:
        """Take one allocation for all layers, and one of scales if it is in 8 bits."""
        scales = [(None, None)] * len(kv_L2NPKE) if scale_L2NPK is None else scale_L2NPK
        return cls(tuple(KvLayer(*kv, *scale) for kv, scale in zip(kv_L2NPKE, scales, strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    attn_norm: Norm
    attention: SelfAttention
    attn_post_norm: Norm | None
    mlp_norm: Norm
    mlp: Mlp | Experts
    mlp_post_norm: Norm | None


class Decoder:
    """A decoder-only model. It allocates its rope tables here and nothing that outlives a step later."""

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, LinearWeight], ops: Ops, *, max_positions: int
    ) -> None:
        """Take the canonical weights: one device, one dtype. Positions are below max_positions."""
        self._config = config
        self._ops = ops
        self._embed = weights["embed.weight"]
        self._dtype = dense(weights, "final_norm.weight").dtype
        device = dense(weights, "final_norm.weight").device
        ropes = {layer.rope for layer in config.layers}
        tables = {rope: rope_table(rope, max_positions, device) for rope in ropes}

        def norm(name: str) -> Norm:
            return Norm(dense(weights, f"{name}.weight"), config.norm_eps, config.norm_plus_one)

        self._layers = [
            _Layer(
                attn_norm=norm(f"layers.{i}.attn_norm"),
                attention=SelfAttention.of(config, i, weights, tables[layer.rope]),
                attn_post_norm=norm(f"layers.{i}.attn_post_norm") if config.sandwich_norms else None,
                mlp_norm=norm(f"layers.{i}.mlp_norm"),
                mlp=feed_forward(config, i, weights),
                mlp_post_norm=norm(f"layers.{i}.mlp_post_norm") if config.sandwich_norms else None,
            )
            for i, layer in enumerate(config.layers)
        ]
        self._final_norm = norm("final_norm")
        # A tied head is a weight of its own where its format is not the embedding's.
        has_head = "head.weight" in weights
        self._head = Linear.named("head", weights) if has_head else Linear(self._embed, None)

    def forward(self, step: StepInputs, kv: KvCache) -> Tensor:
        """Return hidden_TD after the final norm; writes the step's keys and values to the cache."""
        ops = self._ops
        residual_TD = self._embedded(step.token_T)
        delta_TD: Tensor | None = None
        qkv_TX: Tensor | Quantised
        for layer, cache in zip(self._layers, kv.layers, strict=True):
            qkv = layer.attention.qkv
            if delta_TD is None:
                qkv_TX = qkv(layer.attn_norm(residual_TD, ops, qkv.takes), ops)
            else:
                qkv_TX, residual_TD = qkv.after_norm(delta_TD, layer.attn_norm.of_sum(residual_TD), ops)
            assert isinstance(qkv_TX, Tensor)
            delta_TD = layer.attention(qkv_TX, step.position_T, step.slot_T, step.span, cache, ops)
            del qkv_TX
            if layer.attn_post_norm is not None:
                delta_TD = layer.attn_post_norm.plain(delta_TD, ops)
            delta_TD, residual_TD = layer.mlp(delta_TD, layer.mlp_norm.of_sum(residual_TD), ops)
            if layer.mlp_post_norm is not None:
                delta_TD = layer.mlp_post_norm.plain(delta_TD, ops)
        assert delta_TD is not None, "a decoder has at least one layer"
        hidden_TD, _ = add_and_norm(delta_TD, self._final_norm.of_sum(residual_TD), ops)
        return hidden_TD

    def _embedded(self, token_T: Tensor) -> Tensor:
        scale = self._config.embed_scale
        if isinstance(self._embed, Weight8):
            return self._ops.embed_int8(token_T, self._embed, scale, self._dtype)
        assert isinstance(self._embed, Tensor), "no 4-bit embedding is ever made"
        return self._ops.embed(token_T, self._embed, scale)

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """Return logits_SV of normed hidden states: in the model's dtype, behind a soft-cap in float32."""
        logits_SV = self._head(hidden_SD, self._ops)
        cap = self._config.logit_softcap
        if cap is None:
            return logits_SV
        logits_SV = logits_SV.float()
        return self._ops.softcap(logits_SV, cap)
