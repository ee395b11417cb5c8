"""Rounds weights to 4 or 8 bits while SparseGPT prunes them, and remembers the scales it took."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sailfish.compress.rtn import quantise_8, quantise_int4

_MIDDLE, _TOP = 8, 15


class Int4Groups:
    """Rounds each group of columns as `quantise_int4` does: groups with a scale per row."""

    def __init__(
        self, group: int | None, symmetric: bool = True, *, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        """Take how many inputs share a scale (None: all), and the dtype of scales."""
        self.group = group
        self._symmetric = symmetric
        self._dtype = dtype
        self._scales: list[Tensor] = []
        self._zeros: list[Tensor] = []

    def fit(self, weight_OJ: Tensor) -> Callable[[Tensor], Tensor]:
        """Return what rounds the columns of this group, by the scales of least squared error."""
        _, scale_O1, zero_O1 = quantise_int4(weight_OJ, None, self._symmetric, dtype=self._dtype)
        zero_O1 = torch.full_like(scale_O1, _MIDDLE) if zero_O1 is None else zero_O1
        self._scales.append(scale_O1)
        self._zeros.append(zero_O1)
        scale_O, zero_O = scale_O1[:, 0].to(weight_OJ.dtype), zero_O1[:, 0].to(weight_OJ.dtype)
        return lambda w_O: ((w_O / scale_O).round() + zero_O).clamp(0, _TOP).sub(zero_O) * scale_O

    def codes(self, weight_OI: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return (code_OI uint8, scale_OG, zero_OG or None) of the weights that came of it, exactly."""
        n_in = weight_OI.shape[1]
        scale_OG, zero_OG = torch.cat(self._scales, 1), torch.cat(self._zeros, 1)
        group = n_in if self.group is None else self.group
        scale_OI, zero_OI = (
            x.to(weight_OI.dtype).repeat_interleave(group, 1)[:, :n_in] for x in (scale_OG, zero_OG)
        )
        code_OI = ((weight_OI / scale_OI).round() + zero_OI).to(torch.uint8)
        return code_OI, scale_OG, None if self._symmetric else zero_OG


class Int8Rows:
    """Rounds rows to int8, each with the scale that its largest weight had at the start."""

    group: int | None = None

    def __init__(self) -> None:
        self._scale_O = torch.empty(0)

    def fit(self, weight_OJ: Tensor) -> Callable[[Tensor], Tensor]:
        """Return what rounds all columns."""
        self._scale_O = quantise_8(weight_OJ, "int8")[1]
        scale_O = self._scale_O.to(weight_OJ.dtype)
        return lambda w_O: (w_O / scale_O).round().clamp(-127, 127) * scale_O

    def codes(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Return (values_OI int8, scale_O float32) of the weights that came of it, exactly."""
        scale_O = self._scale_O
        return (weight_OI / scale_O.to(weight_OI.dtype)[:, None]).round().to(torch.int8), scale_O
