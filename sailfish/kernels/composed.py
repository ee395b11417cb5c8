"""The norm of a sum, a product and an activation as one op, made of chosen ops and of fused products."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sailfish.kernels.contract import ActivationFormat, Ops, Quantised, SumNorm, Weight8
from sailfish.kernels.int4 import Int4Weight


def norm_linear(
    ops: Ops,
    x_TD: Tensor,
    norm: SumNorm,
    weight: Tensor | Int4Weight | Weight8,
    bias_O: Tensor | None,
    activation: str | None = None,
    out: ActivationFormat = "plain",
) -> tuple[Tensor | Quantised, Tensor]:
    """Meet `contract.NormLinear` by the ops one by one."""
    normed, sum_TD = _normed(ops, x_TD, norm, weight)
    if isinstance(weight, Weight8):
        assert isinstance(normed, Quantised)
        linear_8 = ops.linear_int8 if weight.format == "int8" else ops.linear_fp8
        y_TO = linear_8(normed, weight, bias_O)
    else:
        assert isinstance(normed, Tensor)
        if isinstance(weight, Int4Weight):
            y_TO = ops.linear_int4(normed, weight, bias_O)
        else:
            y_TO = ops.linear(normed, weight, bias_O)
    del normed  # the activation takes its room
    if activation is not None:
        return ops.act_mul(y_TO, activation, out), sum_TD
    return _formatted(ops, y_TO, out), sum_TD


def gated(
    product: Callable[..., Tensor],
    ops: Ops,
    x_TD: Tensor,
    norm: SumNorm,
    weight: Tensor | Int4Weight | Weight8,
    bias_O: Tensor | None,
    activation: str | None = None,
    out: ActivationFormat = "plain",
) -> tuple[Tensor | Quantised, Tensor]:
    """Meet `contract.NormLinear` by a product that ends with the activation, the norm apart."""
    normed, sum_TD = _normed(ops, x_TD, norm, weight)
    return _formatted(ops, product(normed, weight, bias_O, activation=activation), out), sum_TD


def normed_and_gated(
    product: Callable[..., tuple[Tensor, Tensor]],
    ops: Ops,
    x_TD: Tensor,
    norm: SumNorm,
    weight: Tensor | Int4Weight | Weight8,
    bias_O: Tensor | None,
    activation: str | None = None,
    out: ActivationFormat = "plain",
) -> tuple[Tensor | Quantised, Tensor]:
    """Meet `contract.NormLinear` by a product that begins with the norm and ends with the activation."""
    y_TO, sum_TD = product(x_TD, norm, weight, bias_O, activation=activation)
    return _formatted(ops, y_TO, out), sum_TD


def _normed(
    ops: Ops, x_TD: Tensor, norm: SumNorm, weight: Tensor | Int4Weight | Weight8
) -> tuple[Tensor | Quantised, Tensor]:
    to: ActivationFormat = weight.format if isinstance(weight, Weight8) else "plain"
    return ops.add_rms_norm(x_TD, norm.residual_TD, norm.weight_D, norm.eps, norm.plus_one, to)


def _formatted(ops: Ops, y_TO: Tensor, out: ActivationFormat) -> Tensor | Quantised:
    return y_TO if out == "plain" else ops.quantise(y_TO, out)
