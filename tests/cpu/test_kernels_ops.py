"""Every implementation of every op that a CPU can run meets the op's contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from kernel_suite import DTYPES, SCENARIOS, attention, check, draw, load
from torch import Tensor

from sailfish.kernels.contract import Case, Impl
from sailfish.kernels.plain.attention import cpu_math, cpu_sdpa
from sailfish.kernels.reference import attention as reference
from sailfish.kernels.reference import elementwise as reference_elementwise
from sailfish.kernels.table import OPS, implementations

RUNS = [
    pytest.param(impl, scenario, dtype, id=f"{op}-{impl.name}-{scenario}-{dtype}")
    for op in OPS
    for impl in implementations(op)
    if ".reference." in impl.entry or ".plain." in impl.entry
    for scenario in SCENARIOS[op]
    for dtype in DTYPES
    if not (
        "softcap" in scenario
        and impl.rejects(Case(op=op, target="cpu", dtype=dtype, softcap=1.0)) is not None
        and impl.rejects(Case(op=op, target="sm_90", dtype=dtype, softcap=1.0)) is not None
    )
]


@pytest.mark.parametrize(("impl", "scenario", "dtype"), RUNS)
def test_an_implementation_agrees_with_the_reference(impl: Impl, scenario: str, dtype: str) -> None:
    check(impl.op, scenario, load(impl.entry), dtype, "cpu")


def test_every_op_has_scenarios_of_one_and_of_no_token() -> None:
    assert SCENARIOS.keys() == OPS.keys()


@pytest.mark.parametrize(("d_mlp", "run"), [(24, 8), (8, 8), (20, 20)])
def test_gate_and_up_take_turns_of_eight_where_eight_divides_the_width(d_mlp: int, run: int) -> None:
    gate, up = torch.randn(2, 3, d_mlp).unbind()
    turns = [x[:, at : at + run] for at in range(0, d_mlp, run) for x in (gate, up)]
    found = reference_elementwise.act_mul(torch.cat(turns, 1), "silu")
    torch.testing.assert_close(found, gate * gate.sigmoid() * up)


@pytest.mark.parametrize("attention_of", [cpu_sdpa, cpu_math], ids=["sdpa", "math"])
@pytest.mark.parametrize("limit_bytes", [1, 3000, 40_000])
@pytest.mark.parametrize(
    "scenario", [name for name in SCENARIOS["attention"] if "softcap" not in name and "longer" not in name]
)
def test_attention_is_the_same_however_small_its_memory(
    attention_of: Callable[..., Tensor], limit_bytes: int, scenario: str
) -> None:
    small = partial(attention_of, limit_bytes=limit_bytes)
    check("attention", scenario, small, "float32", "cpu")


@pytest.mark.parametrize(
    "name", [impl.name for impl in implementations("attention") if ".cuda." not in impl.entry]
)
@pytest.mark.parametrize("lengths", [[(1, 9), (1, 30), (1, 12)], [(4, 9), (1, 30), (6, 12)]])
def test_a_sequence_of_nan_poisons_no_other(name: str, lengths: list[tuple[int, int]]) -> None:
    impl = next(impl for impl in implementations("attention") if impl.name == name)
    q, kv, span, *rest = attention(lengths)(draw("float32", "cpu"))
    clean = reference.attention(q, kv, span, *rest)
    blocks = span.block_table_BW[0, :2].long()
    kv.k_NPKE[blocks], kv.v_NPKE[blocks] = float("nan"), float("nan")
    found = load(impl.entry)(q, kv, replace(span, memo={}), *rest)
    start = span.query_start[1]
    assert found[:start].isnan().any()
    torch.testing.assert_close(found[start:], clean[start:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [impl.name for impl in implementations("moe")])
def test_a_token_of_nan_poisons_no_other(name: str) -> None:
    impl = next(impl for impl in implementations("moe") if impl.name == name)
    x, router, *rest = SCENARIOS["moe"]["any"](draw("float32", "cpu"))
    clean = load(impl.entry)(x, router, *rest)
    x[5], router[5] = float("nan"), float("nan")
    found = load(impl.entry)(x, router, *rest)
    assert found[5].isnan().all()
    others = torch.arange(len(x)) != 5
    torch.testing.assert_close(found[others], clean[others], atol=1e-5, rtol=1e-5)


def test_layers_of_one_step_share_the_indices_within_a_bound() -> None:
    q, kv, span, scale, *_ = attention([(1, 9), (1, 30), (6, 12)])(draw("float32", "cpu"))
    first = cpu_sdpa(q, kv, span, scale, None, None)
    shared = span.memo["plain"].copy()
    again = cpu_sdpa(q, kv, span, scale, None, None)
    assert len(shared) == 1
    assert all(span.memo["plain"][key] is entry for key, entry in shared.items())
    assert torch.equal(first, again)
    cpu_sdpa(q, kv, span, scale, 4, None)
    assert len(span.memo["plain"]) == 2
    cpu_sdpa(q, kv, span, scale, 5, None, limit_bytes=4000)
    assert len(span.memo["plain"]) == 2, "4000 / 8 bytes are too few for more"
