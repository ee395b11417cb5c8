"""Rows of the fused ops between the products, of the Llama-3.1-8B shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from sailfish.bench.kernels.row import Calls, Candidate, Row, candidates, n_copies, reference
from sailfish.kernels.contract import Case, KvLayer

TOKENS = (1, 16, 64, 256, 2048)
_D, _MLP, _HEADS, _KV_HEADS, _WIDTH, _PAGE, _POSITIONS, _VOCABULARY = (
    4096,
    14336,
    32,
    8,
    128,
    64,
    8192,
    128256,
)
_EPS = 1e-5


def elementwise_rows(target: str) -> Iterator[Row]:
    """Yield each op chosen for the target, and beside it the same in plain torch."""
    for t in TOKENS:
        norm_bytes = 2 * t * _D
        yield from _rows(target, "rms_norm", "plain", t, 2 * norm_bytes, _norm)
        for out in ("plain", "int8", "fp8"):
            out_bytes = norm_bytes if out == "plain" else norm_bytes // 2
            yield from _rows(target, "add_rms_norm", out, t, 3 * norm_bytes + out_bytes, _add_norm)
            out_bytes = (2 if out == "plain" else 1) * t * _MLP
            yield from _rows(target, "act_mul", out, t, 4 * t * _MLP + out_bytes, _act_mul)
        for kv_format in ("plain", "int8", "fp8"):
            kv_bytes = (2 if kv_format == "plain" else 1) * 2 * t * _KV_HEADS * _WIDTH
            qkv_bytes = 2 * t * (_HEADS + 2 * _KV_HEADS) * _WIDTH
            n_bytes = qkv_bytes + 2 * t * _HEADS * _WIDTH + kv_bytes
            yield from _rows(target, "rope_write", kv_format, t, n_bytes, _rope_write)
        yield from _rows(target, "embed", "plain", t, 2 * norm_bytes, _embed)


def _rows(
    target: str, op: str, out: str, t: int, n_bytes: int, arguments: Callable[[int, str], tuple[Any, ...]]
) -> Iterator[Row]:
    name = f"{op}{'' if out == 'plain' else f' {out}'} T={t}"
    case = Case(
        op=op,
        target=target,
        dtype="bfloat16",
        head_dim=_WIDTH,
        n_heads=_HEADS,
        n_kv_heads=_KV_HEADS,
        page_tokens=_PAGE,
        kv_dtype=out if op == "rope_write" and out != "plain" else "",
        d_model=_D,
        d_mlp=_MLP,
    )
    plain = Candidate(name="torch", is_chosen=False, function=reference(op))
    for found in (*candidates(case), plain):
        yield Row(
            name=name + found.suffix,
            implementation=found.name,
            calls=partial(_calls, found.function, arguments, t, out, n_bytes),
            n_bytes=n_bytes,
            entry=found.entry,
            can_capture=found.can_capture,
            is_chosen=found.is_chosen,
        )


def _calls(
    function: Callable[..., Any],
    arguments: Callable[[int, str], tuple[Any, ...]],
    t: int,
    out: str,
    n_bytes: int,
) -> Calls:
    copies = min(n_copies(n_bytes), 16)  # what lies between two products was just written: it is in the cache
    return [partial(function, *arguments(t, out)) for _ in range(copies)]


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def _norm(t: int, out: str) -> tuple[Any, ...]:
    return _random(t, _D), _random(_D), _EPS, False, out


def _add_norm(t: int, out: str) -> tuple[Any, ...]:
    return _random(t, _D), _random(t, _D), _random(_D), _EPS, False, out


def _act_mul(t: int, out: str) -> tuple[Any, ...]:
    return _random(t, 2 * _MLP), "silu", out


def _embed(t: int, _: str) -> tuple[Any, ...]:
    token_T = torch.randint(0, _VOCABULARY, (t,), device="cuda")
    return token_T, _random(_VOCABULARY, _D), 1.0


def _rope_write(t: int, kv_format: str) -> tuple[Any, ...]:
    shape = (-(-t // _PAGE), _PAGE, _KV_HEADS, _WIDTH)
    kinds = {"plain": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
    k_NPKE, v_NPKE = (torch.empty(shape, device="cuda", dtype=kinds[kv_format]) for _ in range(2))
    scales = [None if kv_format == "plain" else torch.ones(shape[:-1], device="cuda") for _ in range(2)]
    table_C2F = torch.rand(_POSITIONS, 2, _WIDTH // 2, device="cuda")
    position_T = torch.randint(0, _POSITIONS, (t,), device="cuda")
    qkv_TX = _random(t, (_HEADS + 2 * _KV_HEADS) * _WIDTH)
    kv = KvLayer(k_NPKE, v_NPKE, *scales)
    slot_T = torch.randperm(shape[0] * _PAGE, device="cuda")[:t]
    return qkv_TX, _HEADS, None, None, _EPS, False, table_C2F, position_T, False, kv, slot_T
