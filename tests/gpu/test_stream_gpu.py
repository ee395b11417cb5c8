"""Products that stream their weights, against float64: every format, ragged shapes, poisoned outputs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sailfish.kernels import int4
from sailfish.kernels.contract import Quantised, SumNorm, Weight8
from sailfish.kernels.cuda import program
from sailfish.kernels.cuda.driver import launches
from sailfish.kernels.cuda.stream import (
    MAX_TOKENS,
    Split,
    linear_8,
    linear_bf16,
    linear_int4,
    norm_linear_bf16,
    norm_linear_int4,
    rejects_norm,
)
from sailfish.kernels.int4 import Int4Weight
from sailfish.kernels.reference import elementwise
from sailfish.kernels.reference.quantised import quantise

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 4e-4}
"""Of the whole result, relative: its rounding, and hardly more."""
SHAPES = [(4096, 4096), (1088, 1000), (14336, 272), (192, 48), (72, 17), (11008, 512)]
"""Inputs and outputs; 1088 and 72 are no multiple of 128, 1000 and 17 none of 16."""
needs_hopper = pytest.mark.skipif(program.architecture() != "sm_90a", reason="clusters are Hopper's")


@pytest.fixture(params=["this device", "compute_80"])
def device_or_older(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run what is compiled for this device, then what a GPU of another architecture would run."""
    if request.param == "compute_80":
        monkeypatch.setattr(program, "architecture", lambda: "compute_80")
    program.kernel.cache_clear()
    yield
    program.kernel.cache_clear()


def draw_int4(n_in: int, n_out: int, group: int | None, has_zero: bool, dtype: torch.dtype) -> Int4Weight:
    """Return a random packed weight."""
    n_groups = 1 if group is None else -(-n_in // group)
    code = torch.randint(0, 16, (n_out, n_in), dtype=torch.uint8, device="cuda")
    scale = (torch.rand(n_out, n_groups, device="cuda") + 0.5) / (5 * n_in**0.5)
    zero = torch.randint(0, 16, scale.shape, device="cuda").to(dtype) if has_zero else None
    return int4.pack(code, scale, zero, dtype)


def error(y: Tensor, truth: Tensor) -> float:
    """Return the relative error, NaN if one element was not written."""
    assert y.shape == truth.shape
    return float((y.double() - truth).norm() / truth.norm())


def poison(n_tokens: int, n_out: int, dtype: torch.dtype) -> None:
    """Leave NaN in the memory that the next result is likely to get."""
    torch.full((n_tokens, n_out), float("nan"), dtype=dtype, device="cuda")


@pytest.mark.usefixtures("device_or_older")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("has_zero", [False, True], ids=["symmetric", "zeros"])
@pytest.mark.parametrize("group", [32, 64, 128, None])
def test_4_bit_weights_agree_with_float64(group: int | None, has_zero: bool, dtype: torch.dtype) -> None:
    for n_in, n_out in SHAPES:
        weight = draw_int4(n_in, n_out, group, has_zero, dtype)
        matrix = int4.dequantise(weight).double()
        bias, residual = (torch.randn(n, device="cuda").to(dtype) for n in (n_out, 16 * n_out))
        for n_tokens in (1, 3, 8, 9, 16):
            x = torch.randn(n_tokens, n_in, device="cuda").to(dtype)
            poison(n_tokens, n_out, dtype)
            y = linear_int4(x, weight, bias)
            truth = x.double() @ matrix.T + bias.double()
            assert error(y, truth) < TOLERANCE[dtype], (n_in, n_out, n_tokens)
            added = residual[: n_tokens * n_out].view(n_tokens, n_out)
            y = linear_int4(x, weight, None, added)
            truth = (x.double() @ matrix.T).to(dtype).double() + added.double()
            assert error(y, truth) < TOLERANCE[dtype], (n_in, n_out, n_tokens)


@pytest.mark.usefixtures("device_or_older")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_weights_agree_with_float64(dtype: torch.dtype) -> None:
    for n_in, n_out in SHAPES:
        weight = (torch.randn(n_out, n_in, device="cuda") / n_in**0.5).to(dtype)
        bias = torch.randn(n_out, device="cuda").to(dtype)
        for n_tokens in (1, 5, 8, 16):
            x = torch.randn(n_tokens, n_in, device="cuda").to(dtype)
            poison(n_tokens, n_out, dtype)
            truth = x.double() @ weight.double().T + bias.double()
            assert error(linear_bf16(x, weight, bias), truth) < TOLERANCE[dtype], (n_in, n_out, n_tokens)


@pytest.mark.usefixtures("device_or_older")
@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_8_bit_weights_agree_with_float64(form: str) -> None:
    for n_in, n_out in [shape for shape in SHAPES if shape[0] % 16 == 0]:
        stored = quantise(torch.randn(n_out, n_in, device="cuda"), form)  # type: ignore[arg-type]
        weight = Weight8(stored.values_TI, stored.scale_T)
        bias = torch.randn(n_out, device="cuda").bfloat16()
        for n_tokens in (1, 5, 8, 16):
            x = quantise(torch.randn(n_tokens, n_in, device="cuda").bfloat16(), form)  # type: ignore[arg-type]
            poison(n_tokens, n_out, torch.bfloat16)
            truth = (
                _widened(x) @ (weight.values_OI.double() * weight.scale_O.double()[:, None]).T + bias.double()
            )
            assert error(linear_8(x, weight, bias), truth) < TOLERANCE[torch.bfloat16], (
                n_in,
                n_out,
                n_tokens,
            )


def _gated(y: Tensor, activation: str) -> Tensor:
    """Return activation(gate) * up of outputs that alternate by eights, as the ops one by one round it."""
    gate, up = y.view(len(y), -1, 2, 8).unbind(2)
    return elementwise.gated(gate, up, activation).flatten(1)


def _close(y: Tensor, expected: Tensor) -> None:
    """Equal up to a rounding of each factor."""
    rtol = 2.0**-6 if y.dtype == torch.bfloat16 else 2.0**-9
    torch.testing.assert_close(y, expected, rtol=rtol, atol=rtol / 64)


@pytest.mark.usefixtures("device_or_older")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_a_gated_product_is_the_product_and_then_the_activation(activation: str, dtype: torch.dtype) -> None:
    for n_in, n_out in ((4096, 3584), (192, 48), (11008, 512)):
        packed = draw_int4(n_in, n_out, 64, True, dtype)
        dense = (torch.randn(n_out, n_in, device="cuda") / n_in**0.5).to(dtype)
        bias = torch.randn(n_out, device="cuda").to(dtype)
        for n_tokens in (1, 4, 5, 8, 9, 16, 35):
            x = torch.randn(n_tokens, n_in, device="cuda").to(dtype)
            poison(n_tokens, n_out // 2, dtype)
            _close(
                linear_int4(x, packed, bias, activation=activation),
                _gated(linear_int4(x, packed, bias), activation),
            )
            poison(n_tokens, n_out // 2, dtype)
            _close(linear_bf16(x, dense, activation=activation), _gated(linear_bf16(x, dense), activation))


@pytest.mark.usefixtures("device_or_older")
@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_a_gated_product_of_8_bits_is_the_product_and_then_the_activation(form: str) -> None:
    stored = quantise(torch.randn(1024, 4096, device="cuda"), form)  # type: ignore[arg-type]
    weight = Weight8(stored.values_TI, stored.scale_T / 64)
    for n_tokens in (1, 8, 16):
        x = quantise(torch.randn(n_tokens, 4096, device="cuda").bfloat16(), form)  # type: ignore[arg-type]
        poison(n_tokens, 512, torch.bfloat16)
        _close(linear_8(x, weight, activation="silu"), _gated(linear_8(x, weight), "silu"))


@pytest.mark.usefixtures("device_or_older")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("plus_one", [False, True])
def test_a_product_of_a_norm_is_the_norm_and_then_the_product(plus_one: bool, dtype: torch.dtype) -> None:
    for n_tokens, width, n_out in (
        (1, 4096, 3584),
        (4, 4096, 272),
        (3, 1280, 48),
        (2, 8192, 512),
        (1, 16384, 64),
    ):
        packed = draw_int4(width, n_out, 128, False, dtype)
        dense = (torch.randn(n_out, width, device="cuda") / width**0.5).to(dtype)
        delta, residual = (torch.randn(n_tokens, width, device="cuda").to(dtype) * 3 for _ in "xr")
        norm = SumNorm(residual, torch.randn(width, device="cuda").to(dtype), 1e-5, plus_one)
        assert rejects_norm(delta, norm) is None
        poison(n_tokens, width, dtype)
        expected, total = elementwise.add_rms_norm(delta, residual, norm.weight_D, norm.eps, plus_one)
        for activation in (None, "silu"):
            truth = expected.double() @ int4.dequantise(packed).double().T
            plain, gated = (
                norm_linear_int4(delta, norm, packed, activation=activation),
                norm_linear_bf16(delta, norm, dense, activation=activation),
            )
            assert torch.equal(plain[1], total) and torch.equal(gated[1], total)
            if activation is None:
                assert error(plain[0], truth) < TOLERANCE[dtype]
                assert error(gated[0], expected.double() @ dense.double().T) < TOLERANCE[dtype]
            else:
                assert error(plain[0], _gated(truth.to(dtype), activation).double()) < 4 * TOLERANCE[dtype]


@pytest.mark.parametrize("n_out", [6144, 28672, 128256])
def test_few_tokens_agree_with_float64_however_many_outputs_there_are(n_out: int) -> None:
    """One and two tokens are divided by the number of outputs: one large block, two small ones, many."""
    weight = draw_int4(1024, n_out, 128, False, torch.bfloat16)
    matrix = int4.dequantise(weight).double()
    for n_tokens in (1, 2):
        x, residual = (torch.randn(n_tokens, 1024, device="cuda").bfloat16() for _ in "xr")
        poison(n_tokens, n_out, torch.bfloat16)
        assert error(linear_int4(x, weight), x.double() @ matrix.T) < TOLERANCE[torch.bfloat16]
        norm = SumNorm(residual, torch.randn(1024, device="cuda").bfloat16(), 1e-5, False)
        expected, _ = elementwise.add_rms_norm(x, residual, norm.weight_D, norm.eps, norm.plus_one)
        poison(n_tokens, n_out, torch.bfloat16)
        found, _ = norm_linear_int4(x, norm, weight)
        assert error(found, expected.double() @ matrix.T) < TOLERANCE[torch.bfloat16]


def test_a_norm_of_many_tokens_is_refused_in_words() -> None:
    delta = torch.randn(5, 4096, device="cuda").bfloat16()
    norm = SumNorm(delta, delta[0], 1e-5, False)
    assert "do not fit" in (rejects_norm(delta, norm) or "")
    assert "multiple of 256" in (rejects_norm(delta[:, :640], norm) or "")


def _widened(x: Quantised) -> Tensor:
    return x.values_TI.double() * x.scale_T.double()[:, None]


def test_any_number_of_tokens_is_multiplied_in_passes() -> None:
    weight = draw_int4(1024, 320, 128, False, torch.bfloat16)
    matrix = int4.dequantise(weight).double()
    for n_tokens in (0, MAX_TOKENS + 1, 40, 64):
        x = torch.randn(n_tokens, 1024, device="cuda").bfloat16()
        y = linear_int4(x, weight)
        assert y.shape == (n_tokens, 320)
        assert n_tokens == 0 or error(y, x.double() @ matrix.T) < TOLERANCE[torch.bfloat16]


@needs_hopper
@pytest.mark.parametrize("splits", [1, 2, 4, 8])
@pytest.mark.parametrize("strip_warps", [1, 2, 4, 8])
def test_every_division_of_the_work_gives_the_same(strip_warps: int, splits: int) -> None:
    weight, gates = (draw_int4(4096, n_out, 128, True, torch.bfloat16) for n_out in (1000, 992))
    matrix = int4.dequantise(weight).double()
    for n_tokens in (2, 16):
        x = torch.randn(n_tokens, 4096, device="cuda").bfloat16()
        for columns in (16, 33, 70):  # the last leaves blocks without work
            split = Split(
                strip_warps=strip_warps, chunk_warps=8 // strip_warps, splits=splits, columns=columns, ring=2
            )
            poison(n_tokens, 1000, torch.bfloat16)
            y = linear_int4(x, weight, split=split)
            assert error(y, x.double() @ matrix.T) < TOLERANCE[torch.bfloat16], columns
            if n_tokens == 2:
                norm = SumNorm(x.flip(0), x[0], 1e-5, True)
                found, _ = norm_linear_int4(x, norm, gates, activation="silu", split=split)
                total = elementwise.add_rms_norm(x, norm.residual_TD, norm.weight_D, norm.eps, True)[0]
                _close(found, linear_int4(total, gates, activation="silu"))


def test_large_activations_and_tiny_ones_keep_their_precision() -> None:
    """Codes are subnormal floats in the tensor cores: neither end of the range may be lost."""
    weight = draw_int4(512, 64, 128, False, torch.bfloat16)
    matrix = int4.dequantise(weight).double()
    for scale in (2.0**-60, 2.0**-20, 2.0**20, 2.0**28):
        x = (torch.randn(4, 512, device="cuda") * scale).bfloat16()
        assert error(linear_int4(x, weight), x.double() @ matrix.T) < TOLERANCE[torch.bfloat16], scale


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    weight = draw_int4(4096, 512, 128, False, torch.bfloat16)
    x = torch.randn(8, 4096, device="cuda").bfloat16()
    other = x.clone()
    other[1:] = float("nan")
    assert torch.equal(linear_int4(x, weight)[0], linear_int4(other, weight)[0])


def test_dependent_products_in_a_graph_see_each_other_s_results() -> None:
    """Launches overlap: each must wait for the one before it, at every replay."""
    shapes = [(512, 2048), (2048, 1024), (1024, 512)]
    weights = [draw_int4(n_in, n_out, 128, False, torch.bfloat16) for n_in, n_out in shapes]
    x = torch.zeros(4, 512, device="cuda", dtype=torch.bfloat16)

    def run() -> Tensor:
        y = x
        for _ in range(4):
            for weight in weights:
                y = linear_int4(y, weight)
        return y

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    before = launches["stream_int4"]
    with torch.cuda.graph(graph):
        y = run()
    assert launches["stream_int4"] - before == 12
    for _ in range(20):
        x.copy_(torch.randn_like(x))
        graph.replay()
        truth = x.double()
        for _ in range(4):
            for weight in weights:
                truth = (truth @ int4.dequantise(weight).double().T).bfloat16().double()
        assert error(y, truth) < 2e-2  # each of 12 products rounds
