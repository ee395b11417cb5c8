"""The one site of matrix products with weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sailfish.kernels.contract import ActivationFormat, Ops, Quantised, SumNorm, Weight8
from sailfish.kernels.int4 import Int4Weight
from sailfish.models.layers.norm import add_and_norm


@dataclass(frozen=True, slots=True)
class OrderedInt4:
    """A 4-bit weight whose inputs are in an order of their own, as GPTQ's act-order leaves them."""

    weight: Int4Weight
    order_I: Tensor
    """int32: which of the model's inputs each of the weight's is."""


LinearWeight = Tensor | Int4Weight | OrderedInt4 | Weight8


@dataclass(frozen=True, slots=True)
class Linear:
    """A weight [out, in] in any format, with its optional bias."""

    weight_OI: LinearWeight
    bias_O: Tensor | None

    @classmethod
    def named(cls, name: str, weights: Mapping[str, LinearWeight], *, has_bias: bool = False) -> Linear:
        """Take `name.weight` and, if asked, `name.bias`."""
        return cls(weights[f"{name}.weight"], dense(weights, f"{name}.bias") if has_bias else None)

    @property
    def takes(self) -> ActivationFormat:
        """The format of activations that it is to be given; it rounds those with a static scale itself."""
        weight = self.weight_OI
        return weight.format if isinstance(weight, Weight8) and weight.input_scale_1 is None else "plain"

    def __call__(self, x_TI: Tensor | Quantised, ops: Ops) -> Tensor:
        weight = self.weight_OI
        if isinstance(weight, Weight8):
            x = x_TI if isinstance(x_TI, Quantised) else _rounded(x_TI, weight, ops)
            return (ops.linear_int8 if weight.format == "int8" else ops.linear_fp8)(x, weight, self.bias_O)
        assert not isinstance(x_TI, Quantised), "who made x asked this linear what it takes"
        if isinstance(weight, Int4Weight):
            return ops.linear_int4(x_TI, weight, self.bias_O)
        if isinstance(weight, OrderedInt4):
            return ops.linear_int4(x_TI.index_select(-1, weight.order_I), weight.weight, self.bias_O)
        return ops.linear(x_TI, weight, self.bias_O)

    def after_norm(
        self,
        x_TD: Tensor,
        norm: SumNorm,
        ops: Ops,
        activation: str | None = None,
        out: ActivationFormat = "plain",
    ) -> tuple[Tensor | Quantised, Tensor]:
        """Return (the activated product with the norm of x + residual, x + residual)."""
        weight = self.weight_OI
        is_static = isinstance(weight, Weight8) and weight.input_scale_1 is not None
        if is_static or isinstance(weight, OrderedInt4):
            normed_TD, sum_TD = add_and_norm(x_TD, norm, ops)
            y_TO = self(normed_TD, ops)
            return (y_TO if activation is None else ops.act_mul(y_TO, activation, out)), sum_TD
        if isinstance(weight, Int4Weight):
            op = ops.norm_linear_int4
        elif isinstance(weight, Weight8):
            op = ops.norm_linear_int8 if weight.format == "int8" else ops.norm_linear_fp8
        else:
            op = ops.norm_linear
        return op(ops, x_TD, norm, weight, self.bias_O, activation, out)


def dense(weights: Mapping[str, LinearWeight], name: str) -> Tensor:
    """Return a weight that no format but the model's own dtype holds."""
    weight = weights[name]
    assert isinstance(weight, Tensor), f"{name} is dense in every engine"
    return weight


def _rounded(x_TI: Tensor, weight: Weight8, ops: Ops) -> Quantised:
    """Return activations as the weight multiplies them."""
    if weight.input_scale_1 is None:
        return ops.quantise(x_TI, weight.format)
    return ops.quantise_static(x_TI, weight.format, weight.input_scale_1)
