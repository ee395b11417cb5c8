"""Products with quantised weights in plain torch: some rows at a time are widened to float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sailfish.kernels.contract import Quantised, Weight8
from sailfish.kernels.int4 import STRIP, Int4Weight, dequantise
from sailfish.kernels.plain.limits import widened_rows


def linear_int4(x_TI: Tensor, weight: Int4Weight, bias_O: Tensor | None = None) -> Tensor:
    """Meet `contract.LinearInt4`."""

    def widened(start: int, end: int) -> Tensor:
        strips = slice(start // STRIP, -(-end // STRIP))
        zero = None if weight.zero is None else weight.zero[strips]
        part = Int4Weight(
            packed=weight.packed[strips],
            scale=weight.scale[strips],
            zero=zero,
            n_out=end - start,
            n_in=weight.n_in,
            group=weight.group,
            layout=weight.layout,
        )
        return dequantise(part)

    return _linear(x_TI.float(), weight.shape, widened, None, None, bias_O, x_TI.dtype)


def linear_8(x: Quantised, weight: Weight8, bias_O: Tensor | None = None) -> Tensor:
    """Meet `contract.Linear8`, sums rounded to float32."""

    def widened(start: int, end: int) -> Tensor:
        return weight.values_OI[start:end].float()

    return _linear(x.values_TI.float(), weight.shape, widened, x.scale_T, weight.scale_O, bias_O, x.dtype)


def _linear(
    x_TI: Tensor,
    shape: tuple[int, int],
    widened: Callable[[int, int], Tensor],
    scale_T: Tensor | None,
    scale_O: Tensor | None,
    bias_O: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    n_out, n_in = shape
    y_TO = x_TI.new_empty((len(x_TI), n_out), dtype=dtype)
    n_rows = widened_rows(n_in, x_TI.device.type)
    for start in range(0, n_out, n_rows):
        end = min(start + n_rows, n_out)
        part = F.linear(x_TI, widened(start, end))
        if scale_T is not None and scale_O is not None:
            part *= scale_T[:, None]
            part *= scale_O[start:end]
        if bias_O is not None:
            part += bias_O[start:end]
        y_TO[:, start:end] = part
    return y_TO
