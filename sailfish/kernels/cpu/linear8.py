"""The product of the CPU's library with weights and activations in 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from sailfish.kernels.contract import Quantised, Weight8
from sailfish.kernels.cpu import library
from sailfish.kernels.cpu.library import ACTIVATIONS


def linear_int8(
    x: Quantised,
    weight: Weight8,
    bias_O: Tensor | None = None,
    *,
    activation: str | None = None,
    level: str | None = None,
) -> Tensor:
    """Meet `contract.Linear8` of int8 to the bit, with a level of instructions or the best of this CPU.

    With an activation, return what `contract.ActMul` makes of the product.
    """
    n_out, n_in = weight.shape
    x_TI, values_OI = x.values_TI.contiguous(), weight.values_OI
    assert values_OI.is_contiguous(), "weights lie as they are stored"
    y_TO = torch.empty(len(x), n_out // (1 if activation is None else 2), dtype=x.dtype)
    library.function("sf_linear_int8", "ppiippipiip", level)(
        x_TI.data_ptr(),
        x.scale_T.data_ptr(),
        len(x),
        n_in,
        values_OI.data_ptr(),
        weight.scale_O.data_ptr(),
        n_out,
        None if bias_O is None else bias_O.data_ptr(),
        ACTIVATIONS[activation],
        x.dtype == torch.bfloat16,
        y_TO.data_ptr(),
    )
    return y_TO
