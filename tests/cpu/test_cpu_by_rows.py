"""The CPU's products by rows, in 8 bits to the bit and in bfloat16, at every level of instructions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_suite import DTYPES, SCENARIOS, draw

from sailfish.kernels.choose import choose_by_rows
from sailfish.kernels.contract import Case, Quantised, StepBounds, Weight8
from sailfish.kernels.cpu import library
from sailfish.kernels.cpu.bf16 import linear_bf16
from sailfish.kernels.cpu.limits import bf16_bytes, int8_bytes, rejects_bf16
from sailfish.kernels.cpu.linear8 import linear_int8
from sailfish.kernels.reference.elementwise import act_mul
from sailfish.kernels.reference.quantised import linear_8, quantise

ABSENT = library.unavailable()
pytestmark = pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))
CASE = Case(op="linear_int8", target="cpu", dtype="bfloat16", n_out=64, n_in=256)


@pytest.mark.parametrize("level", library.levels())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scenario", SCENARIOS["linear_int8"])
def test_the_product_in_8_bits_is_the_reference_to_the_bit(scenario: str, dtype: str, level: str) -> None:
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


@pytest.mark.parametrize("level", library.levels())
@pytest.mark.parametrize("n_tokens", [0, 1, 2, 6, 7, 30])
@pytest.mark.parametrize(("n_in", "n_out"), [(1, 1), (37, 51), (64, 48), (200, 130)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_product_in_bfloat16_is_rounded_once(
    has_bias: bool, n_in: int, n_out: int, n_tokens: int, level: str
) -> None:
    source = draw("bfloat16", "cpu")
    x_TI, weight_OI = source.normal(n_tokens, n_in, scale=n_in**-0.5), source.normal(n_out, n_in)
    bias_O = source.normal(n_out) if has_bias else None
    exact = x_TI.double() @ weight_OI.double().T + (0 if bias_O is None else bias_O)
    found = linear_bf16(x_TI, weight_OI, bias_O, level=level)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("level", library.levels())
def test_a_token_that_is_not_finite_poisons_itself_and_no_other(level: str) -> None:
    source = draw("bfloat16", "cpu")
    x_TI, weight_OI = source.normal(9, 70), source.normal(33, 70)
    clean = linear_bf16(x_TI, weight_OI, level=level)
    x_TI[3, 69] = float("nan")
    found = linear_bf16(x_TI, weight_OI, level=level)
    assert found[3].isnan().all()
    others = [t for t in range(9) if t != 3]
    assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("level", library.levels())
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("op", ["linear", "linear_int8"])
@pytest.mark.parametrize("n_out", [16, 48])
def test_the_product_may_end_with_the_activation(n_out: int, op: str, activation: str, level: str) -> None:
    source = draw("bfloat16", "cpu")
    x: Any = source.normal(9, 70)
    weight: Any = source.normal(n_out, 70)
    product: Any = linear_bf16
    if op == "linear_int8":
        x, values = quantise(x, "int8"), quantise(weight, "int8")
        weight, product = Weight8(values.values_TI, values.scale_T), linear_int8
    bias_O = source.normal(n_out)
    found = product(x, weight, bias_O, activation=activation, level=level)
    expected = act_mul(product(x, weight, bias_O, level=level), activation)
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)


def test_the_choice_declines_in_words_what_the_kernels_cannot_multiply() -> None:
    [choice] = choose_by_rows(CASE)
    assert choice.implementation == "cpu_int8"
    [choice] = choose_by_rows(replace(CASE, n_in=1 << 17))
    assert choice.is_fallback
    assert "within 32 bits" in dict(choice.declined)["cpu_int8"]
    [choice] = choose_by_rows(replace(CASE, op="linear", dtype="float32"))
    assert "not float32" in dict(choice.declined)["cpu_bf16"]


@pytest.mark.parametrize(
    ("levels", "taken"), [(("avx512_bf16", "avx2"), [1, 8, 16, 32]), (("avx2",), [8, 16, 32, 64, None])]
)
def test_torch_multiplies_in_bfloat16_where_it_was_measured_to_be_as_fast(
    levels: tuple[str, ...], taken: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "levels", lambda: levels)
    reason = {n: rejects_bf16(replace(CASE, op="linear", max_rows=n)) for n in (1, 8, 16, 32, 64, None)}
    assert [n for n in reason if reason[n] is None] == taken
    assert all("torch's product is" in words for words in reason.values() if words)


def test_products_before_an_activation_end_with_it() -> None:
    case = replace(CASE, op="norm_linear_int8", activation="silu")
    assert [c.implementation for c in choose_by_rows(case)] == ["cpu_int8_gated"]
    assert [c.implementation for c in choose_by_rows(replace(case, activation=""))] == ["one_by_one"]
    found = {c.implementation for c in choose_by_rows(replace(case, op="norm_linear"))}
    assert "cpu_bf16_gated" in found


def test_the_workspace_holds_padded_activations() -> None:
    bounds = StepBounds(step_tokens=10, max_sequences=1, context_tokens=64)
    case = replace(CASE, n_in=100)
    assert int8_bytes(case, bounds) == 10 * (2 * 128 + 4) + 64
    assert int8_bytes(replace(case, max_rows=1), bounds) == 2 * 128 + 4 + 64
    assert bf16_bytes(replace(case, max_rows=8), bounds) == 8 * 4 * 128 + 64
