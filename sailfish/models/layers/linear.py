"""The one site of matrix products with weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sailfish.kernels.contract import Ops


@dataclass(frozen=True, slots=True)
class Linear:
    """A dense weight [out, in] with its optional bias."""

    weight_OI: Tensor
    bias_O: Tensor | None

    @classmethod
    def named(cls, name: str, weights: Mapping[str, Tensor], *, has_bias: bool = False) -> Linear:
        """Take `name.weight` and, if asked, `name.bias`."""
        return cls(weights[f"{name}.weight"], weights[f"{name}.bias"] if has_bias else None)

    def __call__(self, x_TI: Tensor, ops: Ops) -> Tensor:
        return ops.linear(x_TI, self.weight_OI, self.bias_O)
