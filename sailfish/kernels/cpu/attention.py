"""Attention of the CPU's library: single queries read pages in place, prompts go through torch."""

from __future__ import annotations

import torch
from torch import Tensor

from sailfish.kernels.contract import AttentionSpan, KvLayer
from sailfish.kernels.cpu import library
from sailfish.kernels.plain.attention import cpu_sdpa


def attention(
    q_THE: Tensor,
    kv: KvLayer,
    span: AttentionSpan,
    scale: float,
    window: int | None,
    softcap: float | None,
    *,
    level: str | None = None,
) -> Tensor:
    """Meet `contract.Attention` over caches of q's dtype, with a level of instructions or the best."""
    assert softcap is None and kv.k_NPKE.dtype == q_THE.dtype, "such cases are rejected"
    q_THE = q_THE.contiguous()
    out_THE = torch.empty_like(q_THE)
    _, n_heads, head_dim = q_THE.shape
    page_tokens, n_kv_heads = kv.k_NPKE.shape[1:3]
    n = span.n_single
    if n:
        library.function("sf_attention", "pppipippiiiiiifp", level)(
            q_THE.data_ptr(),
            kv.k_NPKE.data_ptr(),
            kv.v_NPKE.data_ptr(),
            q_THE.dtype == torch.bfloat16,
            span.block_table_RW.data_ptr(),
            span.block_table_RW.stride(0),
            span.row_B.data_ptr(),
            span.kv_len_B.data_ptr(),
            n,
            n_heads,
            n_kv_heads,
            head_dim,
            page_tokens,
            window or 0,
            scale,
            out_THE.data_ptr(),
        )
    if n < len(span.kv_len):
        cpu_sdpa(q_THE, kv, span, scale, window, softcap, first=n, out_THE=out_THE)
    return out_THE
