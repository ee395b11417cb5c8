"""The product of the CPU's library with weights in 4 bits; activations are rounded to 8 on the way in."""

from __future__ import annotations

import torch
from torch import Tensor

from sailfish.kernels.cpu import library
from sailfish.kernels.cpu.library import ACTIVATIONS
from sailfish.kernels.int4 import UNIT, Int4Weight


def linear_int4(
    x_TI: Tensor,
    weight: Int4Weight,
    bias_O: Tensor | None = None,
    *,
    activation: str | None = None,
    level: str | None = None,
) -> Tensor:
    """Meet `contract.LinearInt4` as `int4.linear_w4a8` says, with a level of instructions or the best.

    With an activation, return what `contract.ActMul` makes of the product.
    """
    assert weight.layout == "lanes", "a build for the CPU packs weights so"
    x_TI = x_TI.contiguous()
    y_TO = x_TI.new_empty(len(x_TI), weight.n_out // (1 if activation is None else 2))
    library.function("sf_linear_int4", "piiipppiiiipip", level)(
        x_TI.data_ptr(),
        len(x_TI),
        weight.n_in,
        x_TI.dtype == torch.bfloat16,
        weight.packed.data_ptr(),
        weight.scale.data_ptr(),
        None if weight.zero is None else weight.zero.data_ptr(),
        weight.scale.dtype == torch.bfloat16,
        weight.n_out,
        weight.packed.shape[1] * UNIT,
        weight.group,
        None if bias_O is None else bias_O.data_ptr(),
        ACTIVATIONS[activation],
        y_TO.data_ptr(),
    )
    return y_TO
