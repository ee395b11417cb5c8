"""Products that begin with the norm and end with the activation give what the ops one by one do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_suite import reference_ops
from torch import Tensor

from sailfish.kernels import choose, int4
from sailfish.kernels.contract import ActivationFormat, Case, Choice, Quantised, SumNorm, Weight8
from sailfish.kernels.fused_table import COMPOSED, FUSED
from sailfish.kernels.reference.fused import norm_linear as law
from sailfish.kernels.reference.quantised import quantise

pytestmark = pytest.mark.gpu

RUNS = [(op, impl.name) for op, impls in FUSED.items() for impl in impls if impl.name != COMPOSED]
MOST = {"fused": 1, "gated": 300}
"""Rows tried; streamed ones take 16."""


def made_weight(op: str, n_out: int, n_in: int) -> Tensor | int4.Int4Weight | Weight8:
    """Return a random weight of the op's format."""
    if op == "norm_linear_int4":
        code = torch.randint(0, 16, (n_out, n_in), dtype=torch.uint8, device="cuda")
        scale = torch.rand(n_out, n_in // 128, device="cuda") * 0.01 + 0.002
        return int4.pack(code, scale, None, torch.bfloat16)
    weight_OI = (torch.randn(n_out, n_in, device="cuda") * 0.03).to(torch.bfloat16)
    if op == "norm_linear":
        return weight_OI
    stored = quantise(weight_OI, "int8" if op.endswith("int8") else "fp8")
    return Weight8(stored.values_TI, stored.scale_T)


def values(y: Tensor | Quantised) -> Tensor:
    """Return the numbers of a result."""
    return y.float() if isinstance(y, Tensor) else y.values_TI.float() * y.scale_T[:, None]


@pytest.mark.parametrize("n_out", [2048, 6144, 1040])
@pytest.mark.parametrize(("op", "name"), RUNS)
def test_a_fused_product_agrees_with_the_ops_one_by_one(op: str, name: str, n_out: int) -> None:
    n_in = 2048
    weight, ops = made_weight(op, n_out, n_in), reference_ops()
    norm_weight_D = 1 + 0.1 * torch.randn(n_in, device="cuda").to(torch.bfloat16)
    bias_O = torch.randn(n_out, device="cuda").to(torch.bfloat16)
    activations = ["silu", "gelu_tanh"] if name.endswith("gated") else ["", "silu", "gelu_tanh"]
    most = 16 if "stream" in name else 300
    for n_rows in sorted({1, min(MOST[name.split("_")[-1]], most)}):
        for activation in activations:
            out: ActivationFormat = "plain" if op in ("norm_linear", "norm_linear_int4") else "int8"
            x_TD, residual_TD = torch.randn(2, n_rows, n_in, device="cuda").to(torch.bfloat16).unbind()
            norm = SumNorm(residual_TD, norm_weight_D, 1e-5, False)
            choice = Choice(op=op, implementation=name, why="", declined=())
            function: Any = choose._load(choice)
            found, total = function(ops, x_TD, norm, weight, bias_O, activation or None, out)
            expected, sum_TD = law(ops, x_TD, norm, weight, bias_O, activation or None, out)
            assert torch.equal(total, sum_TD)
            assert values(found).isfinite().all() and values(found).shape == values(expected).shape
            wrong = (values(found) - values(expected)).norm() / values(expected).norm()
            assert wrong < (0.006 if out == "plain" else 0.02), (n_rows, activation)


def test_every_format_has_a_fused_product_on_hopper() -> None:
    for op in FUSED:
        case = Case(
            op=op, target="sm_90", dtype="bfloat16", n_out=6144, n_in=4096, group=128, activation="silu"
        )
        names = {choice.implementation for choice in choose.choose_by_rows(case)}
        assert names - {COMPOSED}, op
