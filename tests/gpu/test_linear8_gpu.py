"""Products of 8-bit activations and weights agree with the law in every tile shape, ragged and real."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sailfish.kernels.contract import Quantised, Weight8
from sailfish.kernels.cuda import linear8
from sailfish.kernels.reference.quantised import linear_8, quantise

pytestmark = pytest.mark.gpu

KINDS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
SIZES = [
    (1, 48, 80),
    (65, 520, 4112),
    (300, 1000, 2064),
    (129, 264, 14336),
    (513, 6144, 4096),
    (1100, 28672, 256),
]
"""Tokens, outputs, inputs. The last has many tiles of few inputs: results leave as fast as they can."""
SPLIT = [(shape, splits) for shape in linear8.SHAPES for splits in (1, 2) if splits == 1 or shape.can_split]


def operands(kind: str, n_tokens: int, n_out: int, n_in: int) -> tuple[Quantised, Weight8, Tensor]:
    x = quantise(torch.randn(n_tokens, n_in, device="cuda").bfloat16(), kind)  # type: ignore[arg-type]
    weight = quantise(torch.randn(n_out, n_in, device="cuda").bfloat16(), kind)  # type: ignore[arg-type]
    bias_O = torch.randn(n_out, device="cuda").bfloat16()
    return x, Weight8(weight.values_TI, weight.scale_T), bias_O


def error(found: Tensor, expected: Tensor) -> float:
    """Return the relative error; NaN if any is left of the poison."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.skipif(torch.cuda.get_device_capability()[0] != 9, reason="Hopper's instructions")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shape", "splits", "size"),
    [(*case, size) for case in SPLIT for size in SIZES if case[1] == 1 or size[2] > 128],
    ids=str,
)
def test_every_tile_shape_fills_every_output(
    shape: linear8.Shape, splits: int, size: tuple[int, int, int], kind: str
) -> None:
    x, weight, bias_O = operands(kind, *size)
    y_TO = torch.full(size[:2], float("nan"), device="cuda", dtype=torch.bfloat16)
    linear8.launch(x, weight, bias_O, y_TO, shape, splits)
    # The tensor cores keep 14 bits of sums of float8, so their error grows with the inputs: a tenth of what
    # float8 itself costs. Integers are exact, then rounded to bfloat16.
    assert error(y_TO, linear_8(x, weight, bias_O)) < (5e-3 if kind == "fp8" else 2e-3)


@pytest.mark.skipif(torch.cuda.get_device_capability()[0] != 9, reason="Hopper's instructions")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "splits"), SPLIT, ids=str)
def test_every_tile_shape_gates_its_product(shape: linear8.Shape, splits: int, kind: str) -> None:
    """As the activation of what the same launch returns without one, gates and ups alternating by eights."""
    for n_tokens, n_out, n_in in ((1, 48, 144), (65, 528, 4112), (300, 1008, 2064), (1100, 28672, 256)):
        x, weight, bias_O = operands(kind, n_tokens, n_out, n_in)
        weight = Weight8(weight.values_OI, weight.scale_O / n_in**0.5)
        y_TO, h_TM = (
            torch.full((n_tokens, n), float("nan"), device="cuda", dtype=torch.bfloat16)
            for n in (n_out, n_out // 2)
        )
        linear8.launch(x, weight, bias_O, y_TO, shape, splits)
        gate, up = (half.flatten(1) for half in y_TO.view(n_tokens, -1, 2, 8).unbind(2))
        for activation in ("silu", "gelu_tanh"):
            linear8.launch(x, weight, bias_O, h_TM, shape, splits, activation)
            act = F.silu(gate.double()) if activation == "silu" else F.gelu(gate.double(), approximate="tanh")
            expected = act.bfloat16() * up
            # The fast exponential moves a value over the middle between two bfloat16 now and then.
            torch.testing.assert_close(h_TM, expected, rtol=2**-6, atol=1e-7)
            assert float((h_TM - expected).abs().gt(1e-7).float().mean()) < 0.01
            h_TM.fill_(float("nan"))


@pytest.mark.parametrize("n_tokens", [1, 31, 2048, 2049, 5000])
def test_torchs_integer_product_is_exact_for_any_number_of_rows(n_tokens: int) -> None:
    x, weight, bias_O = operands("int8", n_tokens, 264, 520)
    assert error(linear8.int_mm_linear(x, weight, bias_O), linear_8(x, weight, bias_O)) < 1e-4


@pytest.mark.parametrize("n_tokens", [1, 100])
def test_other_products_of_float8_agree(n_tokens: int) -> None:
    x, weight, bias_O = operands("fp8", n_tokens, 272, 528)
    expected = linear_8(x, weight, bias_O)
    assert error(linear8.dequantised_linear(x, weight, bias_O), expected) < 5e-3
    assert error(linear8.scaled_mm_linear(x, weight, bias_O), expected) < 5e-3
