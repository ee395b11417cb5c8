"""Rows of paged attention: decodes of many contexts and cache formats, and whole prompts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from sailfish.bench.kernels.row import Calls, Row, candidates
from sailfish.kernels.contract import AttentionSpan, Case, KvLayer

DECODES = (
    *((1, 1024), (1, 8192), (1, 32768), (16, 1024)),
    *((64, 1024), (256, 1024), (64, 8192), (16, 32768)),
)
"""Sequences and the tokens of each, of the rows that others were measured on."""
_SHORT = ((1, 128), (1, 256), (16, 256), (64, 256), (256, 256))
"""What an engine's decodes of short prompts see."""
PREFILLS = ((1, 2048), (4, 2048), (1, 8192), (16, 1024), (1, 32768), (64, 128))
_KV_FORMATS = ("bfloat16", "int8", "fp8")
_HEADS, _KV_HEADS, _WIDTH, _PAGE = 32, 8, 128, 64


def attention_rows(target: str) -> Iterator[Row]:
    """Yield the rows; one set of keys and values is read again by each call."""
    for kv_format in _KV_FORMATS:
        for batch, context in (*DECODES, *_SHORT):
            name = f"decode attention {batch} x {context} {kv_format}"
            yield from _rows(target, name, _KV_HEADS, kv_format, [1] * batch, [context] * batch)
    for batch, context in ((1, 1024), (64, 1024)):
        name = f"decode attention {batch} x {context} bfloat16, 32 kv heads"
        yield from _rows(target, name, _HEADS, "bfloat16", [1] * batch, [context] * batch)
    for batch, n_tokens in PREFILLS:
        name = f"prefill attention {batch} x {n_tokens} bfloat16"
        yield from _rows(target, name, _KV_HEADS, "bfloat16", [n_tokens] * batch, [n_tokens] * batch)
    for kv_format in _KV_FORMATS[1:]:
        yield from _rows(
            target, f"prefill attention 1 x 2048 {kv_format}", _KV_HEADS, kv_format, [2048], [2048]
        )


def _rows(
    target: str, name: str, n_kv_heads: int, kv_format: str, queries: Sequence[int], lengths: Sequence[int]
) -> Iterator[Row]:
    case = Case(
        op="attention",
        target=target,
        dtype="bfloat16",
        head_dim=_WIDTH,
        n_heads=_HEADS,
        n_kv_heads=n_kv_heads,
        page_tokens=_PAGE,
        kv_dtype="" if kv_format == "bfloat16" else kv_format,
    )
    token_bytes = 2 * n_kv_heads * (2 * _WIDTH if kv_format == "bfloat16" else _WIDTH + 4)
    pairs = sum(n * (length - (n - 1) / 2) for n, length in zip(queries, lengths, strict=True))
    for found in candidates(case):
        yield Row(
            name=name + found.suffix,
            implementation=found.name,
            calls=partial(_calls, found.function, n_kv_heads, kv_format, queries, lengths),
            n_bytes=sum(lengths) * token_bytes + 4 * sum(queries) * _HEADS * _WIDTH,
            n_flops=4.0 * pairs * _HEADS * _WIDTH,
            entry=found.entry,
            can_capture=found.can_capture,
            is_chosen=found.is_chosen,
        )


def _calls(
    function: Callable[..., Any],
    n_kv_heads: int,
    kv_format: str,
    queries: Sequence[int],
    lengths: Sequence[int],
) -> Calls:
    span, n_blocks = _span(queries, lengths)
    shape = (n_blocks, _PAGE, n_kv_heads, _WIDTH)
    planes = [_plane(kv_format, shape) for _ in range(2)]
    kv = KvLayer(planes[0][0], planes[1][0], planes[0][1], planes[1][1])
    q_THE = torch.randn(sum(queries), _HEADS, _WIDTH, device="cuda", dtype=torch.bfloat16)
    return [partial(function, q_THE, kv, span, _WIDTH**-0.5, None, None)]


def _plane(kv_format: str, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
    if kv_format == "bfloat16":
        return torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_(), None
    scale = torch.rand(shape[:-1], device="cuda") / 32
    if kv_format == "int8":
        return torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda"), scale
    normal = torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_(std=32.0)
    return normal.to(torch.float8_e4m3fn), scale


def _span(queries: Sequence[int], lengths: Sequence[int]) -> tuple[AttentionSpan, int]:
    """Return a span whose blocks lie in random order, and the number of blocks."""
    n_pages = [-(-length // _PAGE) for length in lengths]
    blocks = list(range(sum(n_pages)))
    random.Random(0).shuffle(blocks)
    width = max(n_pages)
    table = []
    for n in n_pages:
        table.append(blocks[:n] + [0] * (width - n))
        del blocks[:n]
    starts = [sum(queries[:i]) for i in range(len(queries) + 1)]

    def on_device(values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    span = AttentionSpan(
        block_table_RW=on_device(table),
        row_B=torch.arange(len(lengths), dtype=torch.int32, device="cuda"),
        query_start=tuple(starts),
        kv_len=tuple(lengths),
        kv_len_B=on_device(lengths),
        query_start_B1=on_device(starts),
        n_single=len(queries) if max(queries) == 1 else 0,
    )
    return span, sum(n_pages)
