"""RMS norms, alone and joined with the residual add before them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sailfish.kernels.contract import Ops


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMS norm over the last axis."""

    weight_D: Tensor
    eps: float
    plus_one: bool

    def __call__(self, x_TD: Tensor, ops: Ops) -> Tensor:
        return ops.rms_norm(x_TD, self.weight_D, self.eps, self.plus_one)

    def after_add(self, x_TD: Tensor, residual_TD: Tensor, ops: Ops) -> tuple[Tensor, Tensor]:
        """Return (norm of the sum, the sum)."""
        return ops.add_rms_norm(x_TD, residual_TD, self.weight_D, self.eps, self.plus_one)
