"""The CPU's product with 4-bit weights meets its law at every level, and guards the bytes around it."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_suite import DTYPES, SCENARIOS, draw
from local_engine import LocalEngine
from paged import PagedDriver
from torch import Tensor

from sailfish.artifact.start import plan_start
from sailfish.base.config import EngineConfig
from sailfish.build.builder import build_engine
from sailfish.data import demo_model
from sailfish.hardware.probe import probe_cpu
from sailfish.kernels.choose import choose_by_rows
from sailfish.kernels.contract import Case, StepBounds
from sailfish.kernels.cpu import compiler, library
from sailfish.kernels.cpu.int4 import linear_int4
from sailfish.kernels.cpu.limits import int4_bytes
from sailfish.kernels.int4 import Int4Weight, dequantise, linear_w4a8, pack, unpack
from sailfish.kernels.reference.elementwise import act_mul

ABSENT = library.unavailable()
pytestmark = pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))
TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2}


def in_lanes(weight: Int4Weight) -> Int4Weight:
    """Return the same weight as the CPU's kernels read it."""
    return pack(*unpack(weight), weight.scale.dtype, "lanes")


@pytest.mark.parametrize("level", library.levels())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scenario", SCENARIOS["linear_int4"])
def test_the_product_is_that_of_activations_rounded_to_8_bits(scenario: str, dtype: str, level: str) -> None:
    x_TI, weight, bias_O = SCENARIOS["linear_int4"][scenario](draw(dtype, "cpu"))
    found = linear_int4(x_TI, in_lanes(weight), bias_O, level=level)
    expected = linear_w4a8(x_TI, weight, bias_O)
    torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@given(
    n_tokens=st.integers(1, 40),
    n_in=st.integers(1, 420),
    n_out=st.integers(1, 150),
    group=st.sampled_from([32, 64, 128, None]),
    has_zero=st.booleans(),
    has_bias=st.booleans(),
    scales=st.sampled_from([torch.float32, torch.bfloat16]),
    level=st.sampled_from(library.levels() or ("",)),
    seed=st.integers(0, 1000),
)
def test_any_shape_meets_the_law(
    n_tokens: int,
    n_in: int,
    n_out: int,
    group: int | None,
    has_zero: bool,
    has_bias: bool,
    scales: torch.dtype,
    level: str,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    n_groups = 1 if group is None else -(-n_in // group)
    code_OI = torch.randint(0, 16, (n_out, n_in), dtype=torch.uint8, generator=generator)
    zero_OG = torch.randint(0, 16, (n_out, n_groups), generator=generator).float() if has_zero else None
    weight = pack(code_OI, torch.rand(n_out, n_groups, generator=generator), zero_OG, scales, "lanes")
    x_TI = torch.randn(n_tokens, n_in, generator=generator)
    x_TI[0, : n_in // 2] = 0
    bias_O = torch.randn(n_out, generator=generator) if has_bias else None
    found = linear_int4(x_TI, weight, bias_O, level=level)
    expected = linear_w4a8(x_TI, weight, bias_O)
    torch.testing.assert_close(found, expected, atol=2e-5 * n_in, rtol=2e-5)


@pytest.mark.parametrize("level", library.levels())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("n_out", [16, 48, 160])
def test_the_product_may_end_with_the_activation(activation: str, n_out: int, dtype: str, level: str) -> None:
    source = draw(dtype, "cpu")
    weight = pack(
        source.integers(16, n_out, 96).byte(), source.normal(n_out, 3), None, torch.bfloat16, "lanes"
    )
    x_TI, bias_O = source.normal(30, 96), source.normal(n_out, scale=3)
    found = linear_int4(x_TI, weight, bias_O, activation=activation, level=level)
    expected = act_mul(linear_int4(x_TI, weight, bias_O, level=level), activation)
    torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_rounding_activations_costs_what_the_table_says() -> None:
    x_TI, weight, _ = SCENARIOS["linear_int4"]["many tokens"](draw("float32", "cpu"))
    exact = x_TI.double() @ dequantise(weight).double().T
    error = (linear_int4(x_TI, in_lanes(weight)).double() - exact).norm() / exact.norm()
    assert 0.004 < error < 0.008


def test_a_token_that_is_not_finite_poisons_itself_and_no_other() -> None:
    x_TI, weight, _ = SCENARIOS["linear_int4"]["many tokens"](draw("float32", "cpu"))
    weight = in_lanes(weight)
    clean = linear_int4(x_TI, weight)
    x_TI[3, 200], x_TI[7, 5] = float("nan"), float("inf")
    found = linear_int4(x_TI, weight)
    assert found[[3, 7]].isnan().all()
    others = [t for t in range(len(x_TI)) if t not in (3, 7)]
    assert torch.equal(found[others], clean[others])


def test_lanes_hold_rows_and_nibbles_hold_inputs_as_the_layout_says() -> None:
    code_OI = torch.randint(0, 16, (64, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    packed = pack(code_OI, torch.ones(64, 1), None, torch.float32, "lanes").packed
    bytes_ = packed.view(torch.uint8).view(64 // 16, 128 // 8, 16, 4)  # strip, line, lane, byte
    for row in (0, 15, 16, 63):
        for i in (0, 3, 4, 7, 8, 63, 64, 127):
            byte = int(bytes_[row // 16, i // 8, row % 16, i % 4])
            assert byte >> (4 if i % 8 >= 4 else 0) & 15 == code_OI[row, i]


def test_the_choice_declines_in_words_what_the_kernel_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(
        op="linear_int4", target="cpu", dtype="bfloat16", n_out=64, n_in=256, group=128, layout="lanes"
    )
    [choice] = choose_by_rows(case)
    assert choice.implementation == "cpu_int4"
    for other, reason in (
        (replace(case, layout="tensor_core"), "tensor cores"),
        (replace(case, dtype="float16"), "not float16"),
    ):
        [choice] = choose_by_rows(other)
        assert reason in dict(choice.declined)["cpu_int4"]
    fused = replace(case, op="norm_linear_int4")
    for activation, n_out, implementation in (
        ("silu", 64, "cpu_int4_gated"),
        ("", 64, "one_by_one"),
        ("silu", 72, "one_by_one"),
    ):
        [choice] = choose_by_rows(replace(fused, activation=activation, n_out=n_out))
        assert choice.implementation == implementation
    assert "turns of 8 in 72" in dict(choice.declined)["cpu_int4_gated"]
    monkeypatch.setattr(library, "unavailable", lambda: "no C++ compiler is installed")
    [choice] = choose_by_rows(replace(case, n_out=80))
    assert choice.is_fallback
    assert "no C++ compiler" in dict(choice.declined)["cpu_int4"]


def test_the_workspace_holds_activations_scales_and_sums() -> None:
    bounds = StepBounds(step_tokens=10, max_sequences=1, context_tokens=64)
    case = Case(op="linear_int4", target="cpu", dtype="float32", n_out=64, n_in=200, group=64)
    assert int4_bytes(case, bounds) == 10 * (256 + 4 * 8)
    assert int4_bytes(replace(case, max_rows=1), bounds) == 256 + 4 * 8


def test_no_byte_outside_of_the_tensors_is_touched(tmp_path: Path) -> None:
    """A program of its own, under the address and undefined-behaviour sanitizers."""
    program = tmp_path / "guarded"
    flags = (*compiler.LEVELS[library.levels()[0]], "-O0", "-g", "-fsanitize=address,undefined")
    sources = [Path(__file__).with_name("guarded.cpp"), *sorted(compiler.SOURCE_DIR.glob("*.cpp"))]
    compiler.compile_to(program, (*flags, "-fno-sanitize-recover=all"), sources)
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "products" in done.stdout


@pytest.mark.usefixtures("quantises_in_this_process")
def test_an_engine_of_the_cpu_computes_the_law_and_starts_without_the_library_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_engine(
        demo_model(), tmp_path / "engine", config=EngineConfig(weights="int4", dtype="float32"), target="cpu"
    )
    prompt = torch.randint(0, 1000, (70,), generator=torch.Generator().manual_seed(3)).tolist()
    LocalEngine(engine.directory, EngineConfig(strict=True))  # no downgrade
    found = PagedDriver(demo_model(), seed=1, engine=engine).prefill({0: prompt}, largest_chunk=40)[0]

    def law(x_TI: Tensor, weight: Int4Weight, bias_O: Tensor | None, activation: str | None = None) -> Tensor:
        y_TO = linear_w4a8(x_TI, weight, bias_O)
        return y_TO if activation is None else act_mul(y_TO, activation)

    monkeypatch.setattr("sailfish.kernels.cpu.int4.linear_int4", law)
    expected = PagedDriver(demo_model(), seed=1, engine=engine).prefill({0: prompt}, largest_chunk=40)[0]
    wrong_Q = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert 0 < wrong_Q.median() < 2e-3  # an activation next to a tie may round the other way
    monkeypatch.setattr(library, "unavailable", lambda: "no C++ compiler is installed")
    choose_by_rows.cache_clear()
    start = plan_start(engine, EngineConfig(), probe_cpu())
    choose_by_rows.cache_clear()
    assert any(words.startswith("linear_int4 is widened_rows") for words in start.downgrades)
