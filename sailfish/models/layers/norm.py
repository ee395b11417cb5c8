"""RMS norms, alone and joined with the residual add before them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sailfish.kernels.contract import ActivationFormat, Ops, Quantised, SumNorm


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMS norm over the last axis. `out` is what the next layer takes."""

    weight_D: Tensor
    eps: float
    plus_one: bool

    def __call__(self, x_TD: Tensor, ops: Ops, out: ActivationFormat) -> Tensor | Quantised:
        return ops.rms_norm(x_TD, self.weight_D, self.eps, self.plus_one, out)

    def plain(self, x_TD: Tensor, ops: Ops) -> Tensor:
        """Return the norm in x's dtype."""
        normed_TD = self(x_TD, ops, "plain")
        assert not isinstance(normed_TD, Quantised)
        return normed_TD

    def of_sum(self, residual_TD: Tensor) -> SumNorm:
        """Return the norm of what is added to the residual."""
        return SumNorm(residual_TD, self.weight_D, self.eps, self.plus_one)


def add_and_norm(x_TD: Tensor, norm: SumNorm, ops: Ops) -> tuple[Tensor, Tensor]:
    """Return (norm of the sum, the sum)."""
    normed_TD, sum_TD = ops.add_rms_norm(
        x_TD, norm.residual_TD, norm.weight_D, norm.eps, norm.plus_one, "plain"
    )
    assert not isinstance(normed_TD, Quantised)
    return normed_TD, sum_TD
