"""The choice of implementations: reasons for each loser, and a binding of every op."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from sailfish.base.errors import EngineError
from sailfish.kernels import choose as choosing
from sailfish.kernels import int4
from sailfish.kernels.choose import (
    ROW_BUCKETS,
    bind,
    bind_linear,
    choose,
    choose_by_rows,
    find,
    workspace_bytes,
)
from sailfish.kernels.contract import TARGETS, Case, Choice, Ops, StepBounds, SumNorm
from sailfish.kernels.table import OPS, implementations


def _case(op: str, target: str = "cpu", softcap: float | None = None) -> Case:
    return Case(
        op=op,
        target=target,
        dtype="bfloat16",
        head_dim=128,
        n_heads=32,
        n_kv_heads=8,
        page_tokens=64,
        softcap=softcap,
    )


def test_the_table_and_the_bound_ops_name_the_same_ops() -> None:
    assert OPS.keys() == {field.name for field in fields(Ops)}


@pytest.mark.parametrize("target", TARGETS)
def test_every_op_has_an_implementation_on_every_target(target: str) -> None:
    ops = bind(choose(_case(op, target)) for op in OPS)
    assert all(callable(getattr(ops, op)) for op in OPS)


@pytest.mark.parametrize("op", OPS)
def test_the_reference_stands_last_and_takes_every_case(op: str) -> None:
    last = implementations(op)[-1]
    assert last.name == "reference"
    assert all(last.rejects(_case(op, target, softcap=50.0)) is None for target in TARGETS)


def test_a_choice_tells_the_reason_of_each_one_passed_over() -> None:
    choice = choose(_case("attention", "sm_90"))
    assert choice.implementation == "cuda_paged"
    assert choice.declined == (("cpu_sdpa", "made for the CPU, the target is sm_90"),)
    choice = choose(_case("attention", "cpu", softcap=50.0))
    assert choice.implementation == "cpu_math"
    assert [name for name, _ in choice.declined] == ["cpu_sdpa", "cuda_paged", "cuda_sdpa"]


def test_an_implementation_of_another_version_is_named_in_the_error() -> None:
    with pytest.raises(EngineError, match=r"'flash9' of op 'attention'.*build the engine again"):
        find("attention", "flash9")
    with pytest.raises(EngineError, match="no implementation of"):
        bind([Choice(op="warp", implementation="reference", why="", declined=())])


def test_an_engine_that_lacks_an_op_is_refused() -> None:
    with pytest.raises(EngineError, match="no implementation of add_rms_norm, .*build the engine again"):
        bind([choose(_case("attention"))])


def test_workspace_grows_with_context_and_is_known_without_the_device() -> None:
    case = replace(_case("attention", "sm_90"), head_dim=72)
    assert choose(case).implementation == "cuda_sdpa"
    small, large = (
        workspace_bytes(
            case,
            choose(case),
            StepBounds(step_tokens=8192, max_sequences=256, context_tokens=context_tokens),
        )
        for context_tokens in (8192, 131072)
    )
    assert large - small == (131072 - 8192) * (2 * 8 * 72 * 2 + 24)
    case = _case("rms_norm")
    assert (
        workspace_bytes(case, choose(case), StepBounds(step_tokens=1, max_sequences=1, context_tokens=1)) == 0
    )


def test_choosing_loads_no_torch() -> None:
    code = "import sys, sailfish.kernels.choose, sailfish.models.arena; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _linear(op: str, target: str, n_out: int, n_in: int, dtype: str = "bfloat16") -> Case:
    return Case(op=op, target=target, dtype=dtype, n_out=n_out, n_in=n_in, group=128)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (_linear("linear_int4", "sm_90", 4096, 4096), [("cuda_stream_int4", 16), ("cuda_wide_int4", None)]),
        (_linear("linear_int4", "sm_80", 4096, 4100), [("cuda_wide_int4", None)]),
        (_linear("linear_int4", "sm_90", 4096, 4096, "float32"), [("widened_rows", None)]),
        (_linear("linear_int4", "cpu", 4096, 4096), [("widened_rows", None)]),
        (_linear("linear_int8", "sm_90", 4096, 4096), [("cuda_stream_int8", 8), ("cuda_wide_int8", None)]),
        (_linear("linear_fp8", "sm_90", 4096, 4096), [("cuda_stream_fp8", 8), ("cuda_wide_fp8", None)]),
        (_linear("linear", "sm_90", 4096, 4096), [("cuda_stream_bf16", 16), ("torch", None)]),
        (_linear("linear", "sm_90", 4096, 14336), [("cuda_stream_bf16", 8), ("torch", None)]),
        (_linear("linear", "sm_90", 28672, 4096), [("torch", None)]),
        (_linear("linear", "sm_90", 512, 4096), [("torch", None)]),
        (_linear("linear", "sm_90", 4096, 4100), [("torch", None)]),
    ],
    ids=str,
)
def test_a_linear_is_chosen_by_its_shape_and_rows(case: Case, expected: list[tuple[str, int | None]]) -> None:
    found = choose_by_rows(case)
    assert [(choice.implementation, choice.max_rows) for choice in found] == expected
    assert {(choice.n_out, choice.n_in) for choice in found} == {(case.n_out, case.n_in)}
    assert all(choice.max_rows in ROW_BUCKETS for choice in found)
    assert found[-1].max_rows is None, "the last takes any number of rows"


def test_rows_decline_a_kernel_in_words() -> None:
    last = choose_by_rows(_linear("linear_int4", "sm_90", 4096, 4096))[-1]
    assert last.declined == (("cuda_stream_int4", "made for up to 16 rows"),)


def _fused(op: str, target: str, n_out: int, activation: str) -> Case:
    return replace(_linear(op, target, n_out, 4096), activation=activation)


@pytest.mark.parametrize("op", ["norm_linear_int4", "norm_linear_fp8"])
def test_on_a_cpu_weights_its_library_does_not_read_go_through_ops_one_by_one(
    op: str,
) -> None:
    for activation in ("", "silu"):
        [choice] = choose_by_rows(_fused(op, "cpu", 28672, activation))
        assert choice.implementation == "one_by_one" and choice.activation == activation
        cuda = [reason for name, reason in choice.declined if name.startswith("cuda")]
        assert all("made for CUDA" in reason for reason in cuda)


def _named(op: str, activation: str, n_out: int = 28672) -> list[tuple[str, int | None]]:
    choices = choose_by_rows(_fused(op, "sm_90", n_out, activation))
    return [(choice.implementation, choice.max_rows) for choice in choices]


def test_on_hopper_products_are_fused_by_rows() -> None:
    assert _named("norm_linear_int4", "silu") == [
        ("cuda_stream_int4_fused", 1),
        ("cuda_stream_int4_gated", 16),
        ("cuda_wide_int4_gated", None),
    ]
    assert _named("norm_linear_int4", "", 6144) == [("cuda_stream_int4_fused", 1), ("one_by_one", None)]
    assert _named("norm_linear_fp8", "silu") == [("one_by_one", 64), ("cuda_wide_fp8_gated", None)]
    assert _named("norm_linear", "silu") == [
        ("cuda_stream_bf16_fused", 1),
        ("cuda_stream_bf16_gated", 8),
        ("one_by_one", 256),
        ("cuda_wide_bf16_gated", None),
    ]
    assert _named("norm_linear_int8", "") == [("one_by_one", None)]


def test_outputs_that_do_not_take_turns_of_eight_are_activated_apart() -> None:
    [choice] = choose_by_rows(_fused("norm_linear_int4", "sm_90", 28664, "silu"))
    assert choice.implementation == "one_by_one"
    assert {reason for name, reason in choice.declined if name.startswith("cuda")} == {
        "gate and up do not take turns of 8 in 28664 outputs"
    }


def test_a_bound_norm_linear_tells_activations_of_one_shape_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "_load", lambda choice: lambda *args: (choice.activation, *args[5:]))
    needed = [choose(_case(op)) for op in choosing.NEEDED]
    cases = [_fused("norm_linear", "sm_90", 64, activation) for activation in ("", "silu")]
    named = [replace(choose(case), implementation=case.activation or "none") for case in cases]
    ops = bind([*needed, *named])
    x, weight = torch.zeros(3, 4096), torch.zeros(64, 4096)
    norm = SumNorm(x, weight[0], 1e-5, False)
    found: Any = ops.norm_linear(ops, x, norm, weight, None, "silu", "int8")
    assert found == ("silu", "silu", "int8")
    found = ops.norm_linear(ops, x, norm, weight, None)
    assert found == ("", None, "plain")


def test_a_bound_linear_calls_what_was_chosen_for_the_shape_and_the_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[tuple[str, int, tuple[int, int]]] = []

    def load(choice: Choice) -> Any:
        return lambda x, weight, bias: called.append((choice.implementation, len(x), weight.shape))

    monkeypatch.setattr(choosing, "_load", load)
    even, odd = (_linear("linear_int4", "sm_90", 64, n_in) for n_in in (128, 100))
    needed = [choose(_case(op, "sm_90")) for op in choosing.NEEDED]
    ops = bind([*needed, *choose_by_rows(even), *choose_by_rows(odd)])
    for n_in in (128, 100):
        code = torch.zeros(64, n_in, dtype=torch.uint8)
        weight = int4.pack(code, torch.ones(64, 1), None, torch.bfloat16)
        for n_rows in (1, 16, 17, 500):
            ops.linear_int4(torch.zeros(n_rows, n_in), weight, None)
    stream, wide = "cuda_stream_int4", "cuda_wide_int4"
    assert called == [
        *((name, n, (64, 128)) for name, n in ((stream, 1), (stream, 16), (wide, 17), (wide, 500))),
        *((wide, n, (64, 100)) for n in (1, 16, 17, 500)),
    ]
    called.clear()
    bind_linear(even)(torch.zeros(16, 128), replace(weight, n_in=128), None)
    assert called == [(stream, 16, (64, 128))]
