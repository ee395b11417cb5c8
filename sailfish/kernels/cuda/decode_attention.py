"""Paged attention of sequences with one or a few queries each: the checks and the launch of its kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from sailfish.base.errors import EngineError
from sailfish.kernels.contract import KvLayer
from sailfish.kernels.cuda import tensormap
from sailfish.kernels.cuda.program import (
    ARCHITECTURES,
    Defines,
    Variant,
    architecture,
    kernel,
    n_processors,
    stream,
)

HEAD_DIMS = (64, 80, 96, 128, 256)
PAGE_TOKENS = (16, 32, 64)
MAX_QUERIES = 8
"""Queries of one sequence."""
_FILE = "decode_attention.cu"
_KV_FORMATS = {torch.bfloat16: 0, torch.int8: 1, torch.float8_e4m3fn: 2}
_TILE_TOKENS = 16
_MAX_SEQUENCES = 512
_PASS_ROWS = 4
_NO_WINDOW = 1 << 30
_UNWRITTEN = -1
_HOPPER = ("sm_90a",)
_BEFORE_HOPPER = tuple(arch for arch in ARCHITECTURES if arch not in _HOPPER)


class _Problem(ctypes.Structure):
    """`Problem` of decode_attention.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "out", "k", "v", "k_scale", "v_scale")),
        *((name, ctypes.c_void_p) for name in ("block_table", "row", "kv_len", "partial")),
        *((name, ctypes.c_int64) for name in ("q_stride", "block_stride", "scale_stride", "table_stride")),
        *((name, ctypes.c_int32) for name in ("n_sequences", "n_group", "n_queries")),
        *((name, ctypes.c_int32) for name in ("page_shift", "window", "fewest_tiles", "is_settled")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """One way the kernel is compiled and launched."""

    head_dim: int
    kv: int
    query_tiles: int
    warps: int
    stages: int
    is_bulk: bool
    """The copy engine fetches tiles."""
    blocks: int
    """On each multiprocessor."""
    fewest_tiles: int = 8
    """Tiles of a block, at least, where work is divided among several."""

    @property
    def defines(self) -> Defines:
        return (
            ("HEAD", self.head_dim),
            ("KV", self.kv),
            ("QUERY_TILES", self.query_tiles),
            ("WARPS", self.warps),
            ("STAGES", self.stages),
            ("BULK", int(self.is_bulk)),
            ("BLOCKS", self.blocks),
            ("MOST_SHARED_BYTES", self.shared_bytes),
        )

    @property
    def row_bytes(self) -> int:
        """Of one token and head in the cache."""
        return self.head_dim * (1 if self.kv else 2)

    @property
    def shared_bytes(self) -> int:
        """At least the size of `Shared` in decode_attention.cu."""
        rows = 8 * self.query_tiles
        unit = _TILE_TOKENS * (self.row_bytes if self.is_bulk else self.row_bytes + 16)
        ring = self.stages * (2 * unit + 2 * _TILE_TOKENS * 4 + 16)
        sums = rows * 8 + _PASS_ROWS * (self.head_dim + 4) * 4
        sequences = 4 * (4 * _MAX_SEQUENCES + 3) + _MAX_SEQUENCES + self.warps * 8
        return -(-(self.warps * (ring + sums) + rows * (self.head_dim + 8) * 2 + sequences) // 1024) * 1024

    @property
    def slot_words(self) -> int:
        """Words of one partial result."""
        return 8 * self.query_tiles * (self.head_dim + 2)


def rejects(
    head_dim: int, page_tokens: int, dtype: str, n_group: int, kv_bits: int = 16, n_queries: int = 1
) -> str | None:
    """Return why `decode` cannot serve a model, or None. n_group: query heads that share a kv head."""
    if dtype != "bfloat16":
        return f"needs bfloat16 activations, not {dtype}"
    if head_dim not in HEAD_DIMS:
        return f"head width {head_dim} is none of {', '.join(map(str, HEAD_DIMS))}"
    if kv_bits == 8 and head_dim % 32:
        return f"head width {head_dim} is no multiple of 32, as an 8-bit cache needs"
    if page_tokens not in PAGE_TOKENS:
        return f"{page_tokens} tokens a block is none of {', '.join(map(str, PAGE_TOKENS))}"
    if n_queries > MAX_QUERIES:
        return f"{n_queries} queries of a sequence are more than {MAX_QUERIES}"
    if n_group * n_queries > _most_rows(head_dim):
        return f"{n_group} heads share a key, times {n_queries} queries: more than {_most_rows(head_dim)}"
    return None


def decode(
    q_BHE: Tensor,
    kv: KvLayer,
    block_table_RW: Tensor,
    row_B: Tensor,
    kv_len_B: Tensor,
    max_kv_tokens: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    *,
    n_queries: int = 1,
    is_settled: bool = False,
    out_BHE: Tensor | None = None,
) -> Tensor:
    """Meet `contract.Attention` for the newest n_queries tokens of each sequence.

    q_BHE: bfloat16, rows of any stride, heads contiguous; with several queries a sequence those of one
    follow each other, B * n_queries rows in all. kv: bfloat16, or 8 bits with scales; blocks of any
    stride, contiguous inside. block_table_RW, row_B, kv_len_B: int32; a sequence of length 0 yields
    zeros. max_kv_tokens: no sequence is longer; it only bounds the grid. is_settled: what wrote the
    tables, and all but the newest n_queries tokens, has ended when this kernel may begin, since some kernel
    in between lets nobody begin before its own wait; they are then read while that just ahead still runs.

    One launch (per 512 sequences), the same for any lengths. The first call for a shape allocates what
    blocks exchange, so it must not be inside a graph capture; calls of one device run one at a time.
    """
    n_heads, head_dim = q_BHE.shape[1:]
    n_kv_heads = kv.k_NPKE.shape[2]
    n_sequences, n_group = len(kv_len_B), n_heads // n_kv_heads
    if out_BHE is None:
        out_BHE = torch.empty(q_BHE.shape, dtype=q_BHE.dtype, device=q_BHE.device)
    _check(q_BHE, kv, block_table_RW, row_B, kv_len_B, n_queries)
    assert out_BHE.is_contiguous() and len(q_BHE) == n_sequences * n_queries
    shape = _shape(
        head_dim,
        _KV_FORMATS[kv.k_NPKE.dtype],
        -(-n_group * n_queries // 8),
        architecture() in _HOPPER,
        2 * n_sequences * n_kv_heads >= 3 * n_processors(),
    )
    maps = _maps(kv) if shape.is_bulk else (bytes(tensormap.BYTES),) * 2
    seen_tokens = max_kv_tokens if window is None else min(max_kv_tokens, window + n_queries + _TILE_TOKENS)
    tiles = -(-seen_tokens // _TILE_TOKENS)
    for first in range(0, n_sequences, _MAX_SEQUENCES):
        sequences = slice(first, first + _MAX_SEQUENCES)
        queries = slice(first * n_queries, (first + _MAX_SEQUENCES) * n_queries)
        n = len(kv_len_B[sequences])
        most = max(1, n_processors() * shape.blocks // n_kv_heads)
        n_blocks = min(most, max(1, n * -(-tiles // shape.fewest_tiles)))
        problem = _Problem(
            *map(_pointer, (q_BHE[queries], out_BHE[queries], kv.k_NPKE, kv.v_NPKE)),
            *map(_pointer, (kv.k_scale_NPK, kv.v_scale_NPK, block_table_RW)),
            *map(_pointer, (row_B[sequences], kv_len_B[sequences], _partial(most * n_kv_heads, shape))),
            *(q_BHE.stride(0), kv.k_NPKE.stride(0)),
            *(0 if kv.k_scale_NPK is None else kv.k_scale_NPK.stride(0), block_table_RW.stride(0)),
            *(n, n_group, n_queries),
            *(kv.k_NPKE.shape[1].bit_length() - 1, _NO_WINDOW if window is None else window),
            *(shape.fewest_tiles, is_settled, scale, softcap or 0.0),
        )
        kernel(_FILE, "decode_attention", shape.defines).launch(
            (n_kv_heads, n_blocks),
            shape.warps * 32,
            (problem, tensormap.argument(*maps)),
            stream(),
            shared_bytes=shape.shared_bytes,
            after=True,
        )
    return out_BHE


def _check(
    q_BHE: Tensor, kv: KvLayer, block_table_RW: Tensor, row_B: Tensor, kv_len_B: Tensor, n_queries: int
) -> None:
    head_dim, k_NPKE = q_BHE.shape[2], kv.k_NPKE
    n_group = q_BHE.shape[1] // k_NPKE.shape[2]
    bits, dtype = 8 * k_NPKE.element_size(), str(q_BHE.dtype).removeprefix("torch.")
    assert rejects(head_dim, k_NPKE.shape[1], dtype, n_group, bits, n_queries) is None
    assert q_BHE.stride()[1:] == (head_dim, 1) and q_BHE.stride(0) % 8 == 0
    for values_NPKE, scale_NPK in ((kv.k_NPKE, kv.k_scale_NPK), (kv.v_NPKE, kv.v_scale_NPK)):
        assert values_NPKE.dtype == k_NPKE.dtype and values_NPKE.stride() == k_NPKE.stride()
        assert values_NPKE[0].is_contiguous() and values_NPKE.stride(0) % 16 == 0
        assert (scale_NPK is None) == (bits == 16)
        assert scale_NPK is None or (scale_NPK[0].is_contiguous() and scale_NPK.dtype == torch.float32)
    assert block_table_RW.stride(1) == 1 and row_B.is_contiguous() and kv_len_B.is_contiguous()
    assert {block_table_RW.dtype, row_B.dtype, kv_len_B.dtype} == {torch.int32}


def _most_rows(head_dim: int) -> int:
    """Return how many (query, head) pairs that share a kv head one block has registers for."""
    return 32 if head_dim <= 128 else 16


@cache
def _shape(head_dim: int, kv: int, query_tiles: int, is_hopper: bool, is_many: bool) -> _Shape:
    """Return the shape that measured best on an H200, or, before Hopper, one that fits 99 KiB.

    With many sequences several blocks share a multiprocessor: while one sums over its warps at the end of
    a sequence, the others go on reading. With few, larger blocks leave fewer parts to be added up.
    """
    row_bytes = head_dim * (1 if kv else 2)
    query_tiles = 4 if query_tiles == 3 else query_tiles
    warps, stages, blocks = 8, max(2, min(4, 384 // row_bytes)), 1
    if row_bytes > 256:
        warps = 4
    elif is_hopper and is_many and query_tiles == 1 and row_bytes in (128, 256):
        warps, stages, blocks = 4, 2, 512 // row_bytes
    if not is_hopper:
        warps = 2 if head_dim > 128 else 4
    return _Shape(
        head_dim=head_dim,
        kv=kv,
        query_tiles=query_tiles,
        warps=warps,
        stages=stages,
        is_bulk=is_hopper and row_bytes % 128 == 0,
        blocks=blocks,
    )


def _variants() -> Iterator[Variant]:
    for is_hopper, architectures in ((True, _HOPPER), (False, _BEFORE_HOPPER)):
        found = {
            _shape(head_dim, kv, query_tiles, is_hopper, is_many): None
            for head_dim in HEAD_DIMS
            for kv in _KV_FORMATS.values()
            for query_tiles in range(1, _most_rows(head_dim) // 8 + 1)
            for is_many in (False, True)
            if kv == 0 or head_dim % 32 == 0
        }
        for shape in found:
            yield Variant(_FILE, shape.defines, architectures)


VARIANTS = tuple(_variants())


def _maps(kv: KvLayer) -> tuple[bytes, ...]:
    """Describe K and V to the copy engine: tiles of one head, 128 bytes wide, elements by twos of bytes."""
    n_blocks, page_tokens, n_kv_heads, head_dim = kv.k_NPKE.shape
    size = kv.k_NPKE.element_size()
    shape = (n_blocks, page_tokens, n_kv_heads, head_dim * size // 2)
    strides = tuple(stride * size for stride in kv.k_NPKE.stride()[:3])
    return tuple(
        tensormap.tensor(cache.data_ptr(), "bfloat16", shape, strides, (1, _TILE_TOKENS, 1, 64), True)
        for cache in (kv.k_NPKE, kv.v_NPKE)
    )


@cache
def _partial(n_blocks: int, shape: _Shape) -> Tensor:
    """Return where blocks put parts of sequences; every launch leaves it as it found it."""
    if torch.cuda.is_current_stream_capturing():
        raise EngineError(
            "decode attention meets a new shape inside a graph capture", hint="run the step once before"
        )
    return torch.full((n_blocks * shape.slot_words,), _UNWRITTEN, dtype=torch.int32, device="cuda")


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
