"""Paged attention of any step: one query of a sequence by the decode kernel, more by the prefill kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sailfish.kernels.contract import AttentionSpan, KvLayer
from sailfish.kernels.cuda.decode_attention import decode
from sailfish.kernels.cuda.prefill_attention import Work, prefill


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedSpan(AttentionSpan):
    """The span of a step with prompts that is captured, to be replayed for others of as many tokens or fewer.

    Only what is on the device counts, and kv_len, as upper bounds, of the first n_single sequences.
    """

    single_kv_len_B: Tensor
    """int32, on the device: the lengths of the sequences at the beginning that have one query; the rest 0."""
    work: Work
    """The queries of the others."""


def attention(
    q_THE: Tensor,
    kv: KvLayer,
    span: AttentionSpan,
    scale: float,
    window: int | None,
    softcap: float | None,
    *,
    out_THE: Tensor | None = None,
) -> Tensor:
    """Meet `contract.Attention`. A span of single queries can be captured and replayed for other lengths.

    The tables, and all tokens but a step's own, may be read before the wait for `rope_write`: between what
    wrote them and that stands the embedding, which lets nobody begin before it has waited itself. Rows of
    out_THE that no sequence owns stay as they are, or are zeroed.
    """
    if out_THE is None:
        out_THE = torch.empty(q_THE.shape, dtype=q_THE.dtype, device=q_THE.device)
    captured = span if isinstance(span, CapturedSpan) else None
    n = span.n_single
    if n:
        decode(
            q_THE[:n],
            kv,
            span.block_table_RW,
            span.row_B[:n],
            (span.kv_len_B if captured is None else captured.single_kv_len_B)[:n],
            max(span.kv_len[:n]),
            scale,
            window,
            softcap,
            is_settled=True,
            out_BHE=out_THE[:n],
        )
    if captured is not None or n < len(span.kv_len):
        work = None if captured is None else captured.work
        # After the decodes, which zero rows that are no sequence's alone.
        prefill(q_THE, kv, span, scale, window, softcap, first=n, work=work, out_THE=out_THE)
    return out_THE
