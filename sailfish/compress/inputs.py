"""What calibration saw of the inputs of the linears at one site."""

from __future__ import annotations

import torch
from torch import Tensor

from sailfish.compress.fold import scale_hessian
from sailfish.compress.gptq import Hessian

_SAMPLED = 16
"""Tokens of a window that are kept as they are, evenly spaced."""


class Inputs:
    """Statistics of inputs, gathered window by window on their device."""

    def __init__(self, n_in: int, device: torch.device | str) -> None:
        self._hessian = Hessian(n_in, device=device)
        self._changed_II: Tensor | None = None
        self._sum_I = torch.zeros(n_in, device=device)
        self.largest_I = torch.zeros(n_in, device=device)
        self._sample: list[Tensor] = []

    def add(self, x_TI: Tensor) -> None:
        """Take a window's inputs [T, I] of any float dtype."""
        if not len(x_TI):
            return
        self._hessian.add(x_TI)
        magnitude_TI = x_TI.abs()
        self._sum_I += magnitude_TI.sum(0, dtype=torch.float32)
        self.largest_I = torch.maximum(self.largest_I, magnitude_TI.amax(0).float())
        self._sample.append(x_TI[:: max(1, len(x_TI) // _SAMPLED)].float().clone())

    @property
    def n_tokens(self) -> int:
        """Tokens that were seen."""
        return self._hessian.n_tokens

    @property
    def hessian_II(self) -> Tensor:
        """The mean of x x^T, float32."""
        return self._hessian.mean_II if self._changed_II is None else self._changed_II

    @property
    def magnitude_I(self) -> Tensor:
        """The mean of |x|."""
        return self._sum_I / max(1, self.n_tokens)

    @property
    def sample_TI(self) -> Tensor:
        """Some of the tokens, float32."""
        return torch.cat(self._sample)

    def divide(self, scale_I: Tensor) -> None:
        """Become what would have been seen of inputs divided by a scale."""
        self._changed_II = scale_hessian(self.hessian_II, scale_I)
        self._sum_I = self._sum_I / scale_I
        self.largest_I = self.largest_I / scale_I
        self._sample = [x_TI / scale_I for x_TI in self._sample]

    def keep(self, index_J: Tensor) -> None:
        """Become what would have been seen of some of the inputs, int64 on their device."""
        self._changed_II = self.hessian_II[index_J][:, index_J]
        self._sum_I, self.largest_I = self._sum_I[index_J], self.largest_I[index_J]
        self._sample = [x_TI[:, index_J] for x_TI in self._sample]
