"""RMS norms, alone and joined with the residual add before them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sailfish.kernels.contract import ActivationFormat, Ops, Quantised


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

    def after_add(
        self, x_TD: Tensor, residual_TD: Tensor, ops: Ops, out: ActivationFormat
    ) -> tuple[Tensor | Quantised, Tensor]:
        """Return (norm of the sum, the sum)."""
        return ops.add_rms_norm(x_TD, residual_TD, self.weight_D, self.eps, self.plus_one, out)
