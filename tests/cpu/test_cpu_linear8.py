"""The CPU's product in 8 bits is its reference to the bit, at every level of instructions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_suite import DTYPES, SCENARIOS, draw

from sailfish.kernels.choose import choose_by_rows
from sailfish.kernels.contract import Case, Quantised, StepBounds, Weight8
from sailfish.kernels.cpu import library
from sailfish.kernels.cpu.limits import int8_bytes
from sailfish.kernels.cpu.linear8 import linear_int8
from sailfish.kernels.reference.quantised import linear_8

ABSENT = library.unavailable()
pytestmark = pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))
CASE = Case(op="linear_int8", target="cpu", dtype="bfloat16", n_out=64, n_in=256)


@pytest.mark.parametrize("level", library.levels())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scenario", SCENARIOS["linear_int8"])
def test_the_product_is_the_reference_to_the_bit(scenario: str, dtype: str, level: str) -> None:
    x, weight, bias_O = SCENARIOS["linear_int8"][scenario](draw(dtype, "cpu"))
    assert torch.equal(linear_int8(x, weight, bias_O, level=level), linear_8(x, weight, bias_O))


@given(
    n_tokens=st.integers(1, 20),
    n_in=st.integers(1, 300),
    n_out=st.integers(1, 150),
    has_bias=st.booleans(),
    dtype=st.sampled_from(list(DTYPES.values())),
    level=st.sampled_from(library.levels() or ("",)),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_any_bytes_are_multiplied_exactly(
    n_tokens: int, n_in: int, n_out: int, has_bias: bool, dtype: torch.dtype, level: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def bytes_(*shape: int) -> torch.Tensor:
        return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)

    x = Quantised(bytes_(n_tokens, n_in), torch.rand(n_tokens, generator=generator), dtype)
    weight = Weight8(bytes_(n_out, n_in), torch.rand(n_out, generator=generator))
    bias_O = torch.randn(n_out, generator=generator).to(dtype) if has_bias else None
    assert torch.equal(linear_int8(x, weight, bias_O, level=level), linear_8(x, weight, bias_O))


@pytest.mark.parametrize("level", library.levels())
@pytest.mark.parametrize("x", [-128, 127])
@pytest.mark.parametrize("w", [-128, 127])
def test_the_largest_sums_that_are_taken_fit(x: int, w: int, level: str) -> None:
    n_in = (1 << 17) - 1
    activations = Quantised(torch.full((2, n_in), x, dtype=torch.int8), torch.ones(2), torch.float32)
    weight = Weight8(torch.full((3, n_in), w, dtype=torch.int8), torch.ones(3))
    assert (linear_int8(activations, weight, level=level) == torch.tensor(float(x * w * n_in))).all()


def test_the_choice_declines_in_words_what_the_kernel_cannot_sum() -> None:
    [choice] = choose_by_rows(CASE)
    assert choice.implementation == "cpu_int8"
    [choice] = choose_by_rows(replace(CASE, n_in=1 << 17))
    assert choice.is_fallback
    assert "within 32 bits" in dict(choice.declined)["cpu_int8"]


def test_the_workspace_holds_padded_activations_and_their_sums() -> None:
    bounds = StepBounds(step_tokens=10, max_sequences=1, context_tokens=64)
    assert int8_bytes(replace(CASE, n_in=100), bounds) == 10 * (2 * 128 + 4) + 64
    assert int8_bytes(replace(CASE, n_in=100, max_rows=1), bounds) == 2 * 128 + 4 + 64
