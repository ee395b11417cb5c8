"""Paged attention in plain torch: gather the visible tokens, then SDPA or explicit maths, in bounded memory.

Sequences that decode one token are gathered together, padded to the longest of their group; a group is
bounded in bytes. A sequence with more queries is gathered alone, and its queries go in blocks, each over
only the keys it can see. Grouped heads share keys without copying them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sailfish.kernels.contract import AttentionSpan, KvLayer
from sailfish.kernels.plain.limits import (
    CPU_ATTENTION_BYTES,
    CUDA_ATTENTION_BYTES,
    INDEX_BYTES,
    MATH,
    MEMO_FRACTION,
    SDPA,
    Way,
)

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float, float | None], Tensor]
"""(q_BKGQE, k_BKSE, v_BKSE, mask_BQS of visible keys, scale, softcap) -> out_BKGQE.

Without a mask one query sees every key; several queries, as many as keys, see those up to their own.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Sequences first .. last - 1, each with n_queries queries and its last n_keys tokens gathered."""

    first: int
    last: int
    query: int
    n_queries: int
    n_keys: int
    is_ragged: bool


_Gathered = tuple[_Group, Tensor, Tensor | None]
"""A group, its slots, and where its sequences differ in length the mask of those that exist."""


def paged_attention(
    q_THE: Tensor,
    kv: KvLayer,
    span: AttentionSpan,
    scale: float,
    window: int | None,
    softcap: float | None,
    *,
    attend: Attend,
    way: Way,
    limit_bytes: int,
) -> Tensor:
    """Meet `contract.Attention` by `attend`, whose needs `way` tells."""
    page_tokens, n_kv_heads, head_dim = kv.k_NPKE.shape[1:]
    n_heads = q_THE.shape[1]
    pair_bytes = way.pair_bytes(n_heads)
    token_bytes = way.token_bytes(n_kv_heads, head_dim, q_THE.element_size())
    group_tokens = limit_bytes // (token_bytes + pair_bytes)
    q_TKGE = q_THE.view(len(q_THE), n_kv_heads, -1, head_dim)
    out_TKGE = torch.empty_like(q_TKGE)
    for group, slot_BS, mask_BQS in _gathers(span, page_tokens, window, group_tokens, limit_bytes):
        tokens = slice(group.query, group.query + group.n_queries * (group.last - group.first))
        k_BKSE = _gather(kv.k_NPKE, kv.k_scale_NPK, slot_BS, q_THE.dtype)
        v_BKSE = _gather(kv.v_NPKE, kv.v_scale_NPK, slot_BS, q_THE.dtype)
        if group.n_queries == 1:
            q_BKGQE = q_TKGE[tokens].unsqueeze(3)
            out_TKGE[tokens] = attend(q_BKGQE, k_BKSE, v_BKSE, mask_BQS, scale, softcap).squeeze(3)
        else:
            q_1KGQE = q_TKGE[tokens].permute(1, 2, 0, 3).unsqueeze(0)
            out_QKGE = out_TKGE[tokens]
            for rows, keys, mask_1QS in _query_blocks(group, window, limit_bytes // pair_bytes, way, q_THE):
                out_1KGQE = attend(
                    q_1KGQE[..., rows, :],
                    k_BKSE[..., keys, :],
                    v_BKSE[..., keys, :],
                    mask_1QS,
                    scale,
                    softcap,
                )
                out_QKGE[rows] = out_1KGQE[0].permute(2, 0, 1, 3)
        del k_BKSE, v_BKSE  # before the next group is gathered, else two lie in memory at once
    return out_TKGE.flatten(1, 2)


def _gather(cache_NPKE: Tensor, scale_NPK: Tensor | None, slot_BS: Tensor, dtype: torch.dtype) -> Tensor:
    slot_S = slot_BS.flatten()
    rows = cache_NPKE.flatten(0, 1).index_select(0, slot_S)
    if scale_NPK is not None:
        rows = (rows.float() * scale_NPK.flatten(0, 1).index_select(0, slot_S).unsqueeze(-1)).to(dtype)
    return rows.view(*slot_BS.shape, *cache_NPKE.shape[2:]).transpose(1, 2)


def _gathers(
    span: AttentionSpan, page_tokens: int, window: int | None, group_tokens: int, limit_bytes: int
) -> Iterator[_Gathered]:
    """Yield each group with the slots to gather and, where rows differ in length, the mask of real keys."""
    kept: dict[tuple[int | None, int], list[_Gathered]] = span.memo.setdefault("plain", {})
    key = (window, group_tokens)
    if key not in kept:
        groups = _groups(span, window, group_tokens)
        gathered = ((group, *_slots(span, group, page_tokens)) for group in groups)
        n_new = sum((group.last - group.first) * group.n_keys for group in groups)
        n_kept = sum(slot_BS.numel() for entry in kept.values() for _, slot_BS, _ in entry)
        if (n_kept + n_new) * INDEX_BYTES > limit_bytes * MEMO_FRACTION:
            yield from gathered
            return
        kept[key] = list(gathered)
    yield from kept[key]


def _groups(span: AttentionSpan, window: int | None, group_tokens: int) -> list[_Group]:
    groups: list[_Group] = []
    for b, kv_len in enumerate(span.kv_len):
        query = span.query_start[b]
        n_queries = span.query_start[b + 1] - query
        if n_queries == 0:
            continue
        n_keys = kv_len if window is None else min(kv_len, window + n_queries - 1)
        last = groups[-1] if groups else None
        if last is not None and n_queries == last.n_queries == 1 and last.last == b:
            longest = max(n_keys, last.n_keys)
            if longest * (b + 1 - last.first) <= group_tokens:
                groups[-1] = _Group(
                    first=last.first,
                    last=b + 1,
                    query=last.query,
                    n_queries=1,
                    n_keys=longest,
                    is_ragged=last.is_ragged or n_keys != last.n_keys,
                )
                continue
        groups.append(
            _Group(first=b, last=b + 1, query=query, n_queries=n_queries, n_keys=n_keys, is_ragged=False)
        )
    return groups


def _slots(span: AttentionSpan, group: _Group, page_tokens: int) -> tuple[Tensor, Tensor | None]:
    """Return the slots of each sequence's last n_keys tokens, and which of them exist.

    Where a sequence is shorter, its last token stands in: never another sequence's memory, which may
    hold NaN.
    """
    kv_len_B1 = span.kv_len_B[group.first : group.last, None].long()
    position_BS = kv_len_B1 + torch.arange(-group.n_keys, 0, device=kv_len_B1.device)
    mask_BS = None
    if group.is_ragged:
        mask_BS = position_BS >= 0
        position_BS = torch.where(mask_BS, position_BS, kv_len_B1 - 1)
    block_BS = span.block_table_BW[group.first : group.last].gather(1, position_BS // page_tokens)
    slot_BS = block_BS.long() * page_tokens + position_BS % page_tokens
    return slot_BS, None if mask_BS is None else mask_BS.unsqueeze(1)


def _query_blocks(
    group: _Group, window: int | None, block_pairs: int, way: Way, q_THE: Tensor
) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Yield (queries, the gathered keys they may see, mask) block by block."""
    n_queries, n_keys = group.n_queries, group.n_keys
    before = n_keys - n_queries
    if way.has_causal and before == 0 and (window is None or window >= n_keys):
        yield slice(0, n_queries), slice(0, n_keys), None
        return
    key_S = torch.arange(n_keys, device=q_THE.device)
    query_Q1 = key_S[before:, None]
    n_rows = max(1, block_pairs // n_keys)
    for start in range(0, n_queries, n_rows):
        end = min(start + n_rows, n_queries)
        low = 0 if window is None else max(0, before + start - window + 1)
        keys, query = slice(low, before + end), query_Q1[start:end]
        mask_QS = key_S[keys] <= query
        if window is not None:
            mask_QS &= key_S[keys] > query - window
        yield slice(start, end), keys, mask_QS.unsqueeze(0)


def sdpa_attend(
    q_BKGQE: Tensor,
    k_BKSE: Tensor,
    v_BKSE: Tensor,
    mask_BQS: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Attend by torch's SDPA: heads of a group are rows when there is one query, else views of one head."""
    assert softcap is None
    mask_B1QS = None if mask_BQS is None else mask_BQS.unsqueeze(1)
    if q_BKGQE.shape[3] == 1:
        q_BKGE = q_BKGQE.squeeze(3)
        out_BKGE = F.scaled_dot_product_attention(q_BKGE, k_BKSE, v_BKSE, attn_mask=mask_B1QS, scale=scale)
        return out_BKGE.unsqueeze(3)
    q_KGQE = q_BKGQE.squeeze(0)
    k_KGSE, v_KGSE = (x.squeeze(0).unsqueeze(1).expand(-1, q_KGQE.shape[1], -1, -1) for x in (k_BKSE, v_BKSE))
    out_KGQE = F.scaled_dot_product_attention(
        q_KGQE, k_KGSE, v_KGSE, attn_mask=mask_B1QS, is_causal=mask_B1QS is None, scale=scale
    )
    return out_KGQE.unsqueeze(0)


def math_attend(
    q_BKGQE: Tensor,
    k_BKSE: Tensor,
    v_BKSE: Tensor,
    mask_BQS: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Attend by two matrix products in float32 around softcap and softmax."""
    score_BKRS = q_BKGQE.flatten(2, 3).float() @ k_BKSE.float().transpose(2, 3)
    score_BKRS *= scale
    if softcap is not None:
        score_BKRS.div_(softcap).tanh_().mul_(softcap)
    if mask_BQS is not None:
        score_BKGQS = score_BKRS.view(*q_BKGQE.shape[:4], -1)
        score_BKGQS.masked_fill_(~mask_BQS[:, None, None], float("-inf"))
    out_BKRE = score_BKRS.softmax(-1) @ v_BKSE.float()
    return out_BKRE.view(q_BKGQE.shape).to(q_BKGQE.dtype)


_sdpa = partial(paged_attention, attend=sdpa_attend, way=SDPA)
_math = partial(paged_attention, attend=math_attend, way=MATH)
cpu_sdpa = partial(_sdpa, limit_bytes=CPU_ATTENTION_BYTES)
cpu_math = partial(_math, limit_bytes=CPU_ATTENTION_BYTES)
cuda_math = partial(_math, limit_bytes=CUDA_ATTENTION_BYTES)


def cuda_sdpa(
    q_THE: Tensor,
    kv: KvLayer,
    span: AttentionSpan,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Meet `contract.Attention` on CUDA, by torch's flash and memory-efficient kernels only.

    cuDNN's attention is turned off for the process: it plans anew for every shape, and here nearly every
    step has a new one (29 ms each on an H200, against 0.6 ms for the whole call without it).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    return _sdpa(q_THE, kv, span, scale, window, softcap, limit_bytes=CUDA_ATTENTION_BYTES)
