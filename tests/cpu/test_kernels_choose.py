"""The choice of implementations: reasons for each loser, and a binding of every op."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import pytest

from sailfish.base.errors import EngineError
from sailfish.kernels.choose import bind, choose, find, workspace_bytes
from sailfish.kernels.contract import TARGETS, Case, Choice, Ops, StepBounds
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
    assert choice.implementation == "cuda_sdpa"
    assert choice.declined == (("cpu_sdpa", "made for the CPU, the target is sm_90"),)
    choice = choose(_case("attention", "cpu", softcap=50.0))
    assert choice.implementation == "cpu_math"
    assert [name for name, _ in choice.declined] == ["cpu_sdpa", "cuda_sdpa"]


def test_an_implementation_of_another_version_is_named_in_the_error() -> None:
    with pytest.raises(EngineError, match=r"'flash9' of op 'attention'.*build the engine again"):
        find("attention", "flash9")
    with pytest.raises(EngineError, match="no implementation of"):
        bind([Choice(op="warp", implementation="reference", why="", declined=())])


def test_an_engine_that_lacks_an_op_is_refused() -> None:
    with pytest.raises(EngineError, match="no implementation of add_rms_norm, .*build the engine again"):
        bind([choose(_case("attention"))])


def test_workspace_grows_with_context_and_is_known_without_the_device() -> None:
    case = _case("attention", "sm_90")
    small, large = (
        workspace_bytes(
            case,
            choose(case),
            StepBounds(step_tokens=8192, max_sequences=256, context_tokens=context_tokens),
        )
        for context_tokens in (8192, 131072)
    )
    assert large - small == (131072 - 8192) * (2 * 8 * 128 * 2 + 24)
    case = _case("rms_norm")
    assert (
        workspace_bytes(case, choose(case), StepBounds(step_tokens=1, max_sequences=1, context_tokens=1)) == 0
    )


def test_choosing_loads_no_torch() -> None:
    code = "import sys, sailfish.kernels.choose, sailfish.models.arena; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
