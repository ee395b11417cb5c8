"""The shapes and values that every implementation of every op is tried on, whatever the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from paged import make_span
from torch import Tensor

from sailfish.kernels.contract import (
    ActivationFormat,
    AttentionSpan,
    KvLayer,
    Ops,
    Quantised,
    SumNorm,
    Weight8,
)
from sailfish.kernels.int4 import pack
from sailfish.kernels.reference.quantised import quantise
from sailfish.kernels.table import OPS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PAGE_TOKENS = 8
NEVER_READ = 2**30
"""Fills block tables past each sequence's blocks: reading it is an index error."""

Make = Callable[["Draw"], tuple[Any, ...]]


@dataclass(frozen=True)
class Draw:
    """A source of random tensors of one dtype on one device."""

    dtype: torch.dtype
    device: str
    generator: torch.Generator

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Return normal values."""
        return (torch.randn(shape, generator=self.generator) * scale).to(self.device, self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Return int64 values below high."""
        return torch.randint(high, shape, generator=self.generator).to(self.device)

    def distinct(self, n: int, high: int) -> Tensor:
        """Return n distinct int64 values below high."""
        return torch.randperm(high, generator=self.generator)[:n].to(self.device)


def attention(
    lengths: Sequence[tuple[int, int]],
    *,
    window: int | None = None,
    softcap: float | None = None,
    heads: tuple[int, int, int] = (6, 2, 16),
) -> Make:
    """Make a step of sequences with (queries, visible tokens); every slot that is not theirs is NaN."""

    def make(draw: Draw) -> tuple[Any, ...]:
        n_heads, n_kv_heads, head_dim = heads
        n_tokens = sum(n for n, _ in lengths)
        span, slots, n_blocks = random_span(draw, lengths)
        shape = (n_blocks, PAGE_TOKENS, n_kv_heads, head_dim)
        caches = []
        for _ in range(2):
            cache = torch.full(shape, float("nan"), dtype=draw.dtype, device=draw.device)
            cache.flatten(0, 1)[slots] = draw.normal(len(slots), n_kv_heads, head_dim)
            caches.append(cache)
        q_THE = draw.normal(n_tokens, n_heads + 3, head_dim)[:, :n_heads]
        return q_THE, KvLayer(*caches), span, head_dim**-0.5, window, softcap

    return make


def random_span(draw: Draw, lengths: Sequence[tuple[int, int]]) -> tuple[AttentionSpan, Tensor, int]:
    """Return a span over random blocks, the slots that its sequences own, and the number of blocks."""
    needs = [-(-kv_len // PAGE_TOKENS) for _, kv_len in lengths]
    n_blocks = sum(needs) + 3
    free = draw.distinct(n_blocks, n_blocks).tolist()
    blocks = [[free.pop() for _ in range(need)] for need in needs]
    query_start = [0]
    for n, _ in lengths:
        query_start.append(query_start[-1] + n)
    table = [row + [NEVER_READ] * (max(needs) + 1 - len(row)) for row in blocks]
    slots = [
        row[p // PAGE_TOKENS] * PAGE_TOKENS + p % PAGE_TOKENS
        for row, (_, kv_len) in zip(blocks, lengths, strict=True)
        for p in range(kv_len)
    ]
    span = make_span(table, query_start, [kv_len for _, kv_len in lengths], draw.device)
    return span, torch.tensor(slots, device=draw.device), n_blocks


def _norm(*shape: int, plus_one: bool = False) -> Make:
    return lambda draw: (draw.normal(*shape), draw.normal(shape[-1]), 1e-5, plus_one)


def _add_norm(*shape: int, plus_one: bool = False) -> Make:
    return lambda draw: (draw.normal(*shape), draw.normal(*shape), draw.normal(shape[-1]), 1e-5, plus_one)


def _quantise(n_tokens: int, out: ActivationFormat, draw: Draw) -> tuple[Any, ...]:
    return draw.normal(n_tokens, 112) * (torch.arange(n_tokens, device=draw.device) % 5)[:, None], out


def _quantise_static(n_tokens: int, out: ActivationFormat, draw: Draw) -> tuple[Any, ...]:
    """Cut off what is beyond two and a half standard deviations."""
    scale_1 = torch.full((1,), 2.5 / (127 if out == "int8" else 448), device=draw.device)
    return draw.normal(n_tokens, 112), out, scale_1


def _linear(n_tokens: int, n_in: int, n_out: int, has_bias: bool) -> Make:
    return lambda draw: (
        draw.normal(n_tokens, n_in, scale=n_in**-0.5),
        draw.normal(n_out, n_in),
        draw.normal(n_out) if has_bias else None,
    )


def _rope_write(
    n_tokens: int,
    head_dim: int,
    n_pairs: int,
    *,
    interleaved: bool = False,
    has_norm: bool = False,
    plus_one: bool = False,
    cache: torch.dtype | None = None,
) -> Make:
    def make(draw: Draw) -> tuple[Any, ...]:
        angle_CF = torch.rand(50, n_pairs, generator=draw.generator) * 6
        table_C2F = torch.stack((angle_CF.cos(), angle_CF.sin()), 1).to(draw.device)
        norms = [draw.normal(head_dim) if has_norm else None for _ in "qk"]
        caches = draw.normal(2, 6, PAGE_TOKENS, 2, head_dim)
        scales: list[Tensor] = []
        if cache is not None:
            caches = caches.to(cache)
            scales = list(torch.ones(2, 6, PAGE_TOKENS, 2, device=draw.device))
        slots = draw.distinct(n_tokens, 6 * PAGE_TOKENS)
        qkv_TX = draw.normal(n_tokens, (6 + 2 + 2) * head_dim)
        position_T = draw.integers(50, n_tokens)
        kv = KvLayer(*caches, *scales)
        return qkv_TX, 6, *norms, 1e-5, plus_one, table_C2F, position_T, interleaved, kv, slots

    return make


def _linear_int4(n_tokens: int, n_in: int, n_out: int, group: int, *, has_bias: bool, has_zero: bool) -> Make:
    def make(draw: Draw) -> tuple[Any, ...]:
        n_groups = -(-n_in // group)
        code_OI = draw.integers(16, n_out, n_in).to(torch.uint8)
        zero_OG = draw.integers(16, n_out, n_groups).to(draw.dtype) if has_zero else None
        scale_OG = draw.normal(n_out, n_groups, scale=0.2)
        weight = pack(code_OI, scale_OG, zero_OG, torch.bfloat16)
        return draw.normal(n_tokens, n_in, scale=n_in**-0.5), weight, draw.normal(n_out) if has_bias else None

    return make


def _linear_8(out: ActivationFormat, n_tokens: int, n_in: int, n_out: int, *, has_bias: bool) -> Make:
    def make(draw: Draw) -> tuple[Any, ...]:
        weight = quantise(draw.normal(n_out, n_in), out)
        x = quantise(draw.normal(n_tokens, n_in, scale=n_in**-0.5), out)
        bias_O = draw.normal(n_out) if has_bias else None
        return x, Weight8(weight.values_TI, weight.scale_T), bias_O

    return make


_LINEAR_8 = {
    out: {
        "one token": _linear_8(out, 1, 64, 48, has_bias=False),
        "no token": _linear_8(out, 0, 64, 48, has_bias=False),
        "bias": _linear_8(out, 9, 80, 48, has_bias=True),
        "many tokens": _linear_8(out, 257, 96, 32, has_bias=False),
    }
    for out in ("int8", "fp8")
}


def reference_ops() -> Ops:
    """Return the law of every op."""
    return Ops(**{name: load(op.reference) for name, op in OPS.items()})


def _norm_linear(make_linear: Make, activation: str | None, out: ActivationFormat = "plain") -> Make:
    """Make a norm of a sum before a linear of any format, and what comes behind it."""

    def make(draw: Draw) -> tuple[Any, ...]:
        x, weight, bias_O = make_linear(draw)
        shape = (len(x), weight.shape[1])
        norm = SumNorm(draw.normal(*shape), draw.normal(shape[1], scale=shape[1] ** -0.5), 1e-5, False)
        return reference_ops(), draw.normal(*shape), norm, weight, bias_O, activation, out

    return make


def _norm_linears(of: Callable[..., Make]) -> dict[str, Make]:
    """Make every scenario of a norm with the linears of one format: of tokens, inputs and outputs."""
    return {
        "alone": _norm_linear(of(5, 256, 48), None),
        "silu": _norm_linear(of(5, 256, 64), "silu"),
        "gelu": _norm_linear(of(5, 256, 64), "gelu_tanh"),
        "in 8 bits": _norm_linear(of(5, 256, 64), "silu", "int8"),
        "alone in 8 bits": _norm_linear(of(5, 256, 64), None, "fp8"),
        "one token": _norm_linear(of(1, 256, 96), "silu"),
        "no token": _norm_linear(of(0, 256, 96), "silu"),
        "many tokens": _norm_linear(of(70, 256, 96), "silu"),
    }


def _embed_int8(draw: Draw, n: int, scale: float, dtype: torch.dtype, width: int = 16) -> tuple[Any, ...]:
    table = quantise(draw.normal(40, width), "int8")
    return draw.integers(40, n), Weight8(table.values_TI, table.scale_T), scale, dtype


def _moe(n_tokens: int, n_active: int, *, normalise: bool, routing: str = "any") -> Make:
    n_experts, d_model, d_mlp = 7, 24, 40

    def make(draw: Draw) -> tuple[Any, ...]:
        router_TX = draw.normal(n_tokens, n_experts)
        if routing == "one expert":
            router_TX[:, 3] = 40.0
        if routing == "all equal":
            router_TX[:] = 0.5
        return (
            draw.normal(n_tokens, d_model),
            router_TX,
            draw.normal(n_experts, 2 * d_mlp, d_model, scale=d_model**-0.5),
            draw.normal(n_experts, d_model, d_mlp, scale=d_mlp**-0.5),
            n_active,
            normalise,
            "silu",
        )

    return make


_RAGGED = [(1, 1), (1, 7), (1, 8), (1, 9), (1, 40), (1, 64)]
_MIXED = [(1, 9), (0, 12), (5, 5), (0, 0), (1, 30), (1, 31), (11, 24), (1, 1), (7, 16), (1, 16)]

SCENARIOS: dict[str, dict[str, Make]] = {
    "rms_norm": {
        "one token": _norm(1, 96),
        "no token": _norm(0, 96),
        "odd width": _norm(13, 37),
        "heads": _norm(5, 3, 16),
        "plus one": _norm(8, 64, plus_one=True),
    },
    "add_rms_norm": {
        "one token": _add_norm(1, 96),
        "no token": _add_norm(0, 96),
        "odd width": _add_norm(13, 37),
        "plus one": _add_norm(8, 64, plus_one=True),
    },
    "linear": {
        "one token": _linear(1, 64, 48, False),
        "no token": _linear(0, 64, 48, False),
        "bias": _linear(9, 37, 51, True),
        "many tokens": _linear(257, 96, 33, False),
    },
    "quantise": {
        f"{out} {name}": partial(_quantise, n_tokens, out)
        for out in ("int8", "fp8")
        for name, n_tokens in (("one token", 1), ("no token", 0), ("many tokens", 70))
    },
    "quantise_static": {
        f"{out} {name}": partial(_quantise_static, n_tokens, out)
        for out in ("int8", "fp8")
        for name, n_tokens in (("one token", 1), ("no token", 0), ("many tokens", 70))
    },
    "linear_int4": {
        "one token": _linear_int4(1, 256, 64, 128, has_bias=False, has_zero=False),
        "no token": _linear_int4(0, 256, 64, 128, has_bias=False, has_zero=False),
        "zeros and bias": _linear_int4(9, 192, 128, 64, has_bias=True, has_zero=True),
        "padded": _linear_int4(5, 200, 71, 32, has_bias=True, has_zero=False),
        "many tokens": _linear_int4(257, 256, 96, 128, has_bias=False, has_zero=True),
    },
    "linear_int8": _LINEAR_8["int8"],
    "linear_fp8": _LINEAR_8["fp8"],
    "norm_linear": _norm_linears(partial(_linear, has_bias=True)),
    "norm_linear_int4": _norm_linears(partial(_linear_int4, group=64, has_bias=True, has_zero=True)),
    "norm_linear_int8": _norm_linears(partial(_linear_8, "int8", has_bias=True)),
    "norm_linear_fp8": _norm_linears(partial(_linear_8, "fp8", has_bias=True)),
    "rope_write": {
        "half split": _rope_write(7, 16, 8),
        "interleaved": _rope_write(7, 16, 8, interleaved=True),
        "partial": _rope_write(7, 24, 5),
        "partial interleaved": _rope_write(7, 24, 5, interleaved=True),
        "normed": _rope_write(7, 32, 16, has_norm=True),
        "normed plus one": _rope_write(7, 32, 16, has_norm=True, plus_one=True),
        "wide heads": _rope_write(11, 128, 64),
        "one token": _rope_write(1, 16, 8),
        "no token": _rope_write(0, 16, 8),
        "every slot": _rope_write(48, 16, 8),
        "int8 cache": _rope_write(9, 64, 32, cache=torch.int8),
        "fp8 cache": _rope_write(9, 64, 32, cache=torch.float8_e4m3fn),
    },
    "attention": {
        "one token": attention([(1, 1)]),
        "block edge": attention([(1, 8), (8, 8), (8, 16), (1, 16)]),
        "ragged decode": attention(_RAGGED),
        "even decode": attention([(1, 21)] * 5),
        "decode in a window": attention(_RAGGED, window=9),
        "decode in a window of one": attention(_RAGGED, window=1),
        "whole prompts": attention([(33, 33), (2, 2), (64, 64)]),
        "whole prompts in a window": attention([(33, 33), (2, 2), (64, 64)], window=10),
        "window as long as the prompt": attention([(33, 33)], window=33),
        "chunked prompts": attention([(7, 20), (30, 61), (2, 3)]),
        "chunked prompts in a window": attention([(7, 20), (30, 61), (2, 3)], window=16),
        "mixed": attention(_MIXED),
        "mixed in a window": attention(_MIXED, window=6),
        "one head": attention(_MIXED, heads=(1, 1, 8)),
        "as many key heads": attention(_MIXED, heads=(3, 3, 20)),
        "one key head": attention(_MIXED, heads=(4, 1, 64)),
        "softcap": attention(_MIXED, softcap=0.7),
        "softcap in a window": attention(_MIXED, softcap=0.7, window=5),
        "longer than a block of queries": attention([(520, 1500), (1, 1490)], heads=(2, 1, 16)),
        "longer than a group of decodes": attention([(1, 4000), (1, 9000), (1, 100), (1, 9000)]),
    },
    "act_mul": {
        "silu": lambda draw: (draw.normal(9, 74), "silu"),
        "gelu": lambda draw: (draw.normal(9, 74), "gelu_tanh"),
        "in turns of eight": lambda draw: (draw.normal(9, 80), "silu"),
        "one token": lambda draw: (draw.normal(1, 74), "silu"),
        "no token": lambda draw: (draw.normal(0, 80), "silu"),
    },
    "moe": {
        "one token": _moe(1, 2, normalise=True),
        "no token": _moe(0, 2, normalise=True),
        "any": _moe(50, 2, normalise=True),
        "not normalised": _moe(50, 3, normalise=False),
        "one expert a token": _moe(9, 1, normalise=True),
        "every expert": _moe(9, 7, normalise=True),
        "all tokens to one expert": _moe(20, 1, normalise=False, routing="one expert"),
        "a tie of all experts": _moe(20, 2, normalise=True, routing="all equal"),
    },
    "embed": {
        "plain": lambda draw: (draw.integers(40, 9), draw.normal(40, 16), 1.0),
        "scaled": lambda draw: (draw.integers(40, 9), draw.normal(40, 16), 9.7979589),
        "no token": lambda draw: (draw.integers(40, 0), draw.normal(40, 16), 2.0),
    },
    "embed_int8": {
        "float32": lambda draw: _embed_int8(draw, 9, 1.0, torch.float32),
        "bfloat16, scaled": lambda draw: _embed_int8(draw, 9, 9.7979589, torch.bfloat16),
        "ragged": lambda draw: _embed_int8(draw, 9, 1.0, torch.bfloat16, width=21),
        "wide": lambda draw: _embed_int8(draw, 3, 1.0, torch.float32, width=4100),
        "no token": lambda draw: _embed_int8(draw, 0, 2.0, torch.float32),
    },
    "softcap": {
        "any": lambda draw: (draw.normal(5, 33, scale=4.0), 2.5),
        "no row": lambda draw: (draw.normal(0, 33), 2.5),
    },
}


def draw(dtype: str, device: str, seed: int = 0) -> Draw:
    """Return a reproducible source."""
    return Draw(DTYPES[dtype], device, torch.Generator().manual_seed(seed))


def load(entry: str) -> Callable[..., Any]:
    """Import `module:function`."""
    module, name = entry.split(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function


def check(op: str, scenario: str, function: Callable[..., Any], dtype: str, device: str) -> None:
    """Run a function on a scenario, and compare what it returns and writes with the reference."""
    contract = OPS[op]
    results = []
    for candidate in (function, load(contract.reference)):
        args = SCENARIOS[op][scenario](draw(dtype, device))
        with torch.inference_mode():
            out = candidate(*args)
        written = [argument for argument in args if contract.mutates and isinstance(argument, KvLayer)]
        results.append([*_values(out), *(value for argument in written for value in _values(argument))])
    tolerance = contract.tolerance[dtype]
    for found, expected in zip(*results, strict=True):
        assert found.isfinite().all(), "NaN came through"
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def _values(out: Any) -> list[Tensor]:
    """Return what a result says, as tensors: of 8-bit numbers their values times scales."""
    match out:
        case Tensor():
            return [out]
        case Quantised():
            return [out.values_TI.float() * out.scale_T.unsqueeze(-1)]
        case KvLayer():
            planes = ((out.k_NPKE, out.k_scale_NPK), (out.v_NPKE, out.v_scale_NPK))
            return [x if scale is None else x.float() * scale.unsqueeze(-1) for x, scale in planes]
        case tuple():
            return [value for part in out for value in _values(part)]
    raise AssertionError(f"an op returned {type(out)}")
