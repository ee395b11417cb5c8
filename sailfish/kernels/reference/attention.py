"""Reference of paged attention: one sequence at a time, all scores at once, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from sailfish.kernels.contract import AttentionSpan, KvLayer


def attention(
    q_THE: Tensor,
    kv: KvLayer,
    span: AttentionSpan,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Meet `contract.Attention`."""
    page_tokens = kv.k_NPKE.shape[1]
    n_groups = q_THE.shape[1] // kv.k_NPKE.shape[2]
    out_THE = torch.empty_like(q_THE)
    for b, n_keys in enumerate(span.kv_len):
        start, end = span.query_start[b], span.query_start[b + 1]
        blocks = span.block_table_BW[b, : -(-n_keys // page_tokens)]
        k_HSE, v_HSE = (
            _values(cache, scale, blocks)[:n_keys].repeat_interleave(n_groups, 1).transpose(0, 1)
            for cache, scale in ((kv.k_NPKE, kv.k_scale_NPK), (kv.v_NPKE, kv.v_scale_NPK))
        )
        score_HQS = q_THE[start:end].float().transpose(0, 1) @ k_HSE.transpose(1, 2) * scale
        if softcap is not None:
            score_HQS = torch.tanh(score_HQS / softcap) * softcap
        key_S = torch.arange(n_keys, device=q_THE.device)
        query_Q1 = key_S[n_keys - (end - start) :, None]
        hidden_QS = key_S > query_Q1
        if window is not None:
            hidden_QS |= key_S <= query_Q1 - window
        weight_HQS = score_HQS.masked_fill(hidden_QS, float("-inf")).softmax(-1)
        out_THE[start:end] = (weight_HQS @ v_HSE).transpose(0, 1).to(q_THE.dtype)
    return out_THE


def _values(cache_NPKE: Tensor, scale_NPK: Tensor | None, blocks: Tensor) -> Tensor:
    values_SKE = cache_NPKE[blocks].flatten(0, 1).float()
    return values_SKE if scale_NPK is None else values_SKE * scale_NPK[blocks].flatten(0, 1).unsqueeze(-1)
