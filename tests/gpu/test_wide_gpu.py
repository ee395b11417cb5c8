"""The wide 4-bit products agree with float64 on ragged shapes, every kind of weight and every tile shape."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sailfish.kernels import int4
from sailfish.kernels.cuda import program, wide
from sailfish.kernels.cuda.wide import SHAPES, Shape
from sailfish.kernels.int4 import Int4Weight

TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 6e-4}
"""Relative error of the result's norm: what rounding weights and results to 16 bits makes."""
KINDS = [
    (group, has_zero, dtype)
    for group in (32, 64, 128, 0)
    for has_zero in (False, True)
    for dtype in TOLERANCE
]
SIZES = [(1, 64, 64), (33, 200, 320), (64, 72, 1024), (100, 1000, 448), (129, 264, 192), (300, 640, 1088)]
"""Tokens, outputs and inputs at and off the edges of tiles."""

needs_hopper = pytest.mark.skipif(program.architecture() != "sm_90a", reason="the kernel is Hopper's")


@pytest.fixture
def older_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run what a GPU of another architecture would: PTX for the oldest."""
    monkeypatch.setattr(program, "architecture", lambda: "compute_80")
    program.kernel.cache_clear()
    yield
    program.kernel.cache_clear()


def _weight(n_out: int, n_in: int, group: int, has_zero: bool, dtype: torch.dtype) -> Int4Weight:
    n_groups = -(-n_in // group) if group else 1
    code = torch.randint(0, 16, (n_out, n_in), dtype=torch.uint8, device="cuda")
    scale = (torch.rand(n_out, n_groups, device="cuda") + 0.5) / (5 * n_in**0.5)
    zero = torch.randint(0, 16, scale.shape, device="cuda").to(dtype) if has_zero else None
    return int4.pack(code, scale, zero, dtype)


def _error(y_TO: Tensor, x_TI: Tensor, weight: Int4Weight, bias_O: Tensor | None) -> float:
    truth = x_TI.double() @ int4.dequantise(weight).double().T + (0 if bias_O is None else bias_O.double())
    return float((y_TO.double() - truth).norm() / truth.norm())


def _gated(y_TO: Tensor, activation: str) -> Tensor:
    """Return activation(gate) * up of rows that alternate by eights, each factor rounded."""
    gate, up = (half.flatten(1) for half in y_TO.view(len(y_TO), -1, 2, 8).unbind(2))
    act = F.silu(gate.double()) if activation == "silu" else F.gelu(gate.double(), approximate="tanh")
    return act.to(y_TO.dtype) * up


def _assert_nearly_all_equal(found: Tensor, expected: Tensor) -> None:
    """The fast exponential moves a value over the middle between two of the dtype now and then."""
    assert found.shape == expected.shape
    step = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found, expected, rtol=2 * step, atol=1e-7)
    assert float((found - expected).abs().gt(1e-7).float().mean()) < 0.01


def _poison(n: int, dtype: torch.dtype) -> None:
    """Leave NaN in the memory that the next tensors of n elements are likely to get."""
    for _ in range(3):
        torch.full((n,), float("nan"), dtype=dtype, device="cuda")


def _check(n_tokens: int, weight: Int4Weight, has_bias: bool) -> None:
    dtype = weight.scale.dtype
    x_TI = torch.randn(n_tokens, weight.n_in, dtype=dtype, device="cuda")
    bias_O = torch.randn(weight.n_out, dtype=dtype, device="cuda") if has_bias else None
    _poison(n_tokens * (weight.n_out + 7) // 8 * 8, dtype)
    y_TO = wide.linear_int4(x_TI, weight, bias_O)
    assert y_TO.shape == (n_tokens, weight.n_out)
    assert y_TO.is_contiguous()
    assert _error(y_TO, x_TI, weight, bias_O) < TOLERANCE[dtype]


@pytest.mark.parametrize(("group", "has_zero", "dtype"), KINDS)
def test_every_kind_of_weight_gives_the_product(group: int, has_zero: bool, dtype: torch.dtype) -> None:
    for index, (n_tokens, n_out, n_in) in enumerate(SIZES):
        _check(n_tokens, _weight(n_out, n_in, group, has_zero, dtype), has_bias=index % 2 == 0)


@pytest.mark.parametrize(("group", "has_zero", "dtype"), KINDS)
@pytest.mark.usefixtures("older_gpu")
def test_an_older_gpu_gives_the_product_too(group: int, has_zero: bool, dtype: torch.dtype) -> None:
    for index, (n_tokens, n_out, n_in) in enumerate(SIZES):
        _check(n_tokens, _weight(n_out, n_in, group, has_zero, dtype), has_bias=index % 2 == 0)


@needs_hopper
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_tile_shape_and_split_gives_the_product(shape: Shape) -> None:
    """Poisoned results show what a shape leaves unwritten."""
    for n_tokens, n_out, n_in in (*SIZES, (700, 6000, 256), (1100, 28672, 128)):
        weight = _weight(n_out, n_in, 64, True, torch.bfloat16)
        x_TI = torch.randn(n_tokens, n_in, dtype=torch.bfloat16, device="cuda")
        for splits in range(1, 9):
            y_TO = torch.full((n_tokens, n_out), float("nan"), dtype=torch.bfloat16, device="cuda")
            wide.launch(x_TI, weight, None, y_TO, shape, splits)
            assert _error(y_TO, x_TI, weight, None) < TOLERANCE[torch.bfloat16], (
                n_tokens,
                n_out,
                n_in,
                splits,
            )


GATED_SIZES = [
    (1, 16, 64),
    (33, 208, 320),
    (100, 1008, 448),
    (129, 272, 192),
    (300, 640, 1088),
    (1100, 28672, 128),
]


@needs_hopper
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_tile_shape_and_split_gates_its_product(shape: Shape, activation: str) -> None:
    """As the activation of what the same launch returns without one."""
    for n_tokens, n_out, n_in in GATED_SIZES:
        weight = _weight(n_out, n_in, 64, True, torch.bfloat16)
        x_TI = torch.randn(n_tokens, n_in, dtype=torch.bfloat16, device="cuda") * 4
        bias_O = torch.randn(n_out, dtype=torch.bfloat16, device="cuda")
        for splits in range(1, 9):
            y_TO, h_TM = (
                torch.full((n_tokens, n), float("nan"), dtype=torch.bfloat16, device="cuda")
                for n in (n_out, n_out // 2)
            )
            wide.launch(x_TI, weight, bias_O, y_TO, shape, splits)
            wide.launch(x_TI, weight, bias_O, h_TM, shape, splits, activation)
            _assert_nearly_all_equal(h_TM, _gated(y_TO, activation))


@pytest.mark.parametrize("is_older", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_activation_follows_the_product(
    dtype: torch.dtype, activation: str, is_older: bool, request: pytest.FixtureRequest
) -> None:
    if is_older:
        request.getfixturevalue("older_gpu")
    for n_tokens, n_out, n_in in (*GATED_SIZES, (64, 4096, 4096), (1100, 1008, 448)):
        weight = _weight(n_out, n_in, 128, False, dtype)
        x_TI = torch.randn(n_tokens, n_in, dtype=dtype, device="cuda") * 4
        bias_O = torch.randn(n_out, dtype=dtype, device="cuda")
        _poison(n_tokens * n_out // 2, dtype)
        h_TM = wide.linear_int4(x_TI, weight, bias_O, activation=activation)
        assert h_TM.is_contiguous()
        _assert_nearly_all_equal(h_TM, _gated(wide.linear_int4(x_TI, weight, bias_O), activation))


@needs_hopper
@pytest.mark.parametrize("n_tokens", [1, 16, 31, 48, 64, 96, 128, 200, 256, 512, 1025])
def test_the_chosen_shape_fits_a_layer(n_tokens: int) -> None:
    """The layers of an 8B model, at sizes on both sides of every step of the table."""
    for n_out, n_in in ((6144, 4096), (4096, 14336)):
        _check(n_tokens, _weight(n_out, n_in, 128, False, torch.bfloat16), has_bias=True)


@pytest.mark.parametrize("is_older", [False, True])
def test_a_captured_graph_follows_its_inputs(is_older: bool, request: pytest.FixtureRequest) -> None:
    """Counters and barriers are as the first launch found them, and launches in a row wait for each other."""
    if is_older:
        request.getfixturevalue("older_gpu")
    up, down = (_weight(*size, 128, False, torch.bfloat16) for size in ((1536, 512), (512, 1536)))
    x_TI = torch.randn(40, 512, dtype=torch.bfloat16, device="cuda")

    def run() -> Tensor:
        h_TI = x_TI
        for _ in range(3):
            h_TI = wide.linear_int4(wide.linear_int4(h_TI, up), down)
        return h_TI

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_TO = run()
    for _ in range(5):
        x_TI.normal_()
        y_TO.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y_TO, run())


def test_no_tokens_give_no_rows() -> None:
    weight = _weight(64, 64, 0, False, torch.bfloat16)
    assert wide.linear_int4(torch.empty(0, 64, dtype=torch.bfloat16, device="cuda"), weight).shape == (0, 64)


def test_rows_that_are_not_contiguous_or_aligned_are_copied() -> None:
    weight = _weight(136, 100, 32, True, torch.float16)
    wide_TI = torch.randn(50, 203, dtype=torch.float16, device="cuda")
    for x_TI in (wide_TI[:, 1:101], wide_TI[:, ::2][:, :100], wide_TI.T[:100, :].T):
        y_TO = wide.linear_int4(x_TI, weight)
        assert _error(y_TO, x_TI, weight, None) < TOLERANCE[torch.float16]
