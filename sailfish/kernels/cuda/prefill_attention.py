"""Paged attention of sequences with many queries: the checks, the work list and the launch of its kernels."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sailfish.kernels.contract import AttentionSpan, KvLayer
from sailfish.kernels.cuda import program, tensormap
from sailfish.kernels.cuda.program import Variant

HEAD_DIMS = (16, 32, 64, 80, 96, 128, 192, 256)
WIDE_HEAD_DIMS = (64, 128)
"""Head widths of the Hopper kernel."""
_FILE = "prefill_attention.cu"
_WIDE_FILE = "prefill_attention_wide.cu"
VARIANTS = (
    *(Variant(_FILE, (("HEAD", head_dim), ("KV_BITS", bits))) for head_dim in HEAD_DIMS for bits in (16, 8)),
    *(
        Variant(_WIDE_FILE, (("HEAD", head_dim), ("KV_BITS", bits), ("PEERS", peers)), ("sm_90a",))
        for head_dim in WIDE_HEAD_DIMS
        for bits, peers in ((16, 1), (16, 2), (8, 1))
    ),
)
_NO_WINDOW = 1 << 30
_LOG2_E = math.log2(math.e)


class _Problem(ctypes.Structure):
    """`Problem` of prefill_attention.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "out", "k", "v", "k_scale", "v_scale")),
        *((name, ctypes.c_void_p) for name in ("block_table", "row", "kv_len", "query_start", "work")),
        *((name, ctypes.c_int64) for name in ("q_stride", "block_stride", "scale_stride", "table_stride")),
        *((name, ctypes.c_int32) for name in ("n_heads", "n_kv_heads", "page_shift", "pack_shift")),
        *((name, ctypes.c_int32) for name in ("window", "is_fp8")),
        *((name, ctypes.c_float) for name in ("cap_scale", "log2_scale")),
    )


@dataclass(frozen=True, slots=True)
class Work:
    """The runs of queries that a step computes, on the device: their number, then one word each."""

    words: Tensor
    """int32, as `work_words` says."""
    most_runs: int
    """They are no more."""


def rejects(head_dim: int, page_tokens: int, dtype: str) -> str | None:
    """Return why `prefill` cannot serve a model, or None."""
    if dtype != "bfloat16":
        return f"needs bfloat16 activations, not {dtype}"
    if head_dim not in HEAD_DIMS:
        return f"head width {head_dim} is none of {', '.join(map(str, HEAD_DIMS))}"
    if page_tokens & (page_tokens - 1):
        return f"{page_tokens} tokens a block is not a power of two"
    return None


def prefill(
    q_THE: Tensor,
    kv: KvLayer,
    span: AttentionSpan,
    scale: float,
    window: int | None,
    softcap: float | None,
    *,
    first: int = 0,
    work: Work | None = None,
    out_THE: Tensor | None = None,
) -> Tensor:
    """Meet `contract.Attention` for sequences from `first` on; earlier rows of out_THE stay as they are.

    q_THE: bfloat16, rows of any stride, heads contiguous. kv: bfloat16, or 8 bits with scales; blocks of
    any stride, contiguous inside. work: what to compute, of `work_words`; it then may change between replays
    of a captured call, as all else that is on the device, and nothing of the span that is on the host counts.
    None: it is made of the span. One launch.
    """
    n_heads, head_dim = q_THE.shape[1:]
    page_tokens, n_kv_heads = kv.k_NPKE.shape[1:3]
    if out_THE is None:
        out_THE = torch.empty(q_THE.shape, dtype=q_THE.dtype, device=q_THE.device)
    assert rejects(head_dim, page_tokens, str(q_THE.dtype).removeprefix("torch.")) is None
    assert q_THE.stride()[1:] == (head_dim, 1) and q_THE.stride(0) % 8 == 0 and out_THE.is_contiguous()
    assert kv.k_NPKE.stride() == kv.v_NPKE.stride() and kv.k_NPKE[0].is_contiguous()
    bits = 8 * kv.k_NPKE.element_size()
    is_wide = head_dim in WIDE_HEAD_DIMS and page_tokens in range(8, 129)
    is_wide = is_wide and program.architecture() == "sm_90a"
    rows = tile_rows(head_dim)
    pack = min(_power_of_two_in(n_heads // n_kv_heads), rows)
    work = work or _work(span, rows, first)
    problem = _Problem(
        *map(_pointer, (q_THE, out_THE, kv.k_NPKE, kv.v_NPKE, kv.k_scale_NPK, kv.v_scale_NPK)),
        *map(_pointer, (span.block_table_RW, span.row_B, span.kv_len_B, span.query_start_B1)),
        work.words.data_ptr(),
        *(q_THE.stride(0), kv.k_NPKE.stride(0), 0 if kv.k_scale_NPK is None else kv.k_scale_NPK.stride(0)),
        span.block_table_RW.stride(0),
        *(n_heads, n_kv_heads, page_tokens.bit_length() - 1, pack.bit_length() - 1),
        *(_NO_WINDOW if window is None else window, kv.k_NPKE.dtype == torch.float8_e4m3fn),
        *(0.0 if softcap is None else scale / softcap, (scale if softcap is None else softcap) * _LOG2_E),
    )
    if is_wide:
        _launch_wide(problem, work.most_runs, _maps(q_THE, kv, pack), head_dim, bits)
    else:
        _launch(problem, work.most_runs, head_dim, bits)
    return out_THE


def tile_rows(head_dim: int) -> int:
    """Return how many queries a run of the work list has."""
    return 128 if head_dim <= 128 else 64


def work_words(query_start: Sequence[int], kv_len: Sequence[int], rows: int, first: int) -> list[int]:
    """Cut the queries of sequences from `first` on into runs of `rows`: their number, then the runs.

    The longest in keys come first, so that no long one comes last.
    """
    runs = [
        (kv_len[b] - n + min(start + rows, n), b << 16 | start // rows)
        for b in range(first, len(kv_len))
        for n in (query_start[b + 1] - query_start[b],)
        for start in range(0, n, rows)
    ]
    runs.sort(key=lambda run: -run[0])
    return [len(runs), *(run for _, run in runs)]


def _launch(problem: _Problem, most_runs: int, head_dim: int, bits: int) -> None:
    rows, keys = (128, 64) if head_dim <= 128 else (64, 32 if bits == 16 else 16)
    n_rows = 4 * keys + (0 if head_dim <= 128 else rows)  # of K and V in two stages, and of Q
    program.kernel(_FILE, "prefill_attention", (("HEAD", head_dim), ("KV_BITS", bits))).launch(
        (most_runs * problem.n_heads,),
        rows * 2,
        (problem,),
        program.stream(),
        shared_bytes=n_rows * (head_dim + 8) * 2,
        after=True,
    )


def _launch_wide(problem: _Problem, most_runs: int, maps: Any, head_dim: int, bits: int) -> None:
    peers = 2 if problem.pack_shift and bits == 16 else 1  # tiles of heads of one kv head have the same keys
    defines = (("HEAD", head_dim), ("KV_BITS", bits), ("PEERS", peers))
    program.kernel(_WIDE_FILE, "prefill_attention_wide", defines).launch(
        (min(most_runs * problem.n_heads, program.n_processors() // peers * peers),),
        384,
        (problem, maps),
        program.stream(),
        shared_bytes=7 * 128 * head_dim * 2 + 2048,  # Q, and K and V in their stages; tiles and barriers
        after=True,
        cluster=peers,
    )


def _maps(q_THE: Tensor, kv: KvLayer, pack: int) -> Any:
    """Return the maps of Q, in boxes of a tile's rows, and of K and V, in boxes of one head of a block.

    A row of a box is 64 columns of two bytes, or in an 8-bit cache all columns, two of them as one.
    """
    n_blocks, page_tokens, n_kv_heads, head_dim = kv.k_NPKE.shape
    size = kv.k_NPKE.element_size()
    q_strides = (q_THE.stride(0) * 2, head_dim * 2)
    shape = (n_blocks, n_kv_heads, page_tokens, head_dim * size // 2)
    strides = (kv.k_NPKE.stride(0) * size, head_dim * size, n_kv_heads * head_dim * size)
    box = (1, 1, min(page_tokens, 64), min(shape[3], 64))
    return tensormap.argument(
        tensormap.tensor(
            q_THE.data_ptr(), "bfloat16", tuple(q_THE.shape), q_strides, (128 // pack, pack, 64), True
        ),
        *(
            tensormap.tensor(x.data_ptr(), "bfloat16", shape, strides, box, size == 2)
            for x in (kv.k_NPKE, kv.v_NPKE)
        ),
    )


def _power_of_two_in(n: int) -> int:
    """Return the largest power of two that divides n."""
    return n & -n


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _work(span: AttentionSpan, rows: int, first: int) -> Work:
    key = ("prefill", rows, first)
    work: Work | None = span.memo.get(key)
    if work is None:
        words = work_words(span.query_start, span.kv_len, rows, first)
        # Through pinned memory, so that the host need not wait.
        sent = torch.tensor(words, dtype=torch.int32).pin_memory().to(span.row_B.device, non_blocking=True)
        work = span.memo[key] = Work(sent, len(words) - 1)
    return work
