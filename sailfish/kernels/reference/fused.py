"""Reference of the op that norms a sum, multiplies it and activates the product."""

from __future__ import annotations

from torch import Tensor

from sailfish.kernels.contract import ActivationFormat, Ops, Quantised, SumNorm, Weight8
from sailfish.kernels.int4 import Int4Weight, linear_int4
from sailfish.kernels.reference.elementwise import act_mul, add_rms_norm, linear
from sailfish.kernels.reference.quantised import formatted, linear_8, quantise


def norm_linear(
    ops: Ops,
    x_TD: Tensor,
    norm: SumNorm,
    weight: Tensor | Int4Weight | Weight8,
    bias_O: Tensor | None,
    activation: str | None = None,
    out: ActivationFormat = "plain",
) -> tuple[Tensor | Quantised, Tensor]:
    """Meet `contract.NormLinear`; of `ops` it needs none."""
    normed, sum_TD = add_rms_norm(x_TD, norm.residual_TD, norm.weight_D, norm.eps, norm.plus_one)
    assert isinstance(normed, Tensor)
    if isinstance(weight, Weight8):
        y_TO = linear_8(quantise(normed, weight.format), weight, bias_O)
    elif isinstance(weight, Int4Weight):
        y_TO = linear_int4(normed, weight, bias_O)
    else:
        y_TO = linear(normed, weight, bias_O)
    return (formatted(y_TO, out) if activation is None else act_mul(y_TO, activation, out)), sum_TD
