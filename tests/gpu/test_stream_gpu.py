"""Products that stream their weights, against float64: every format, ragged shapes, poisoned outputs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sailfish.kernels import int4
from sailfish.kernels.contract import Quantised, Weight8
from sailfish.kernels.cuda import program
from sailfish.kernels.cuda.driver import launches
from sailfish.kernels.cuda.stream import MAX_TOKENS, Split, linear_8, linear_bf16, linear_int4
from sailfish.kernels.int4 import Int4Weight
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
    weight = draw_int4(4096, 1000, 128, True, torch.bfloat16)
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
