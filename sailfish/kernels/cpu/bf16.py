"""The product of the CPU's library in bfloat16."""

from __future__ import annotations

from torch import Tensor

from sailfish.kernels.cpu import library
from sailfish.kernels.cpu.library import ACTIVATIONS


def linear_bf16(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    *,
    activation: str | None = None,
    level: str | None = None,
) -> Tensor:
    """Meet `contract.LinearOp` in bfloat16, with a level of instructions or the best of this CPU.

    With an activation, return what `contract.ActMul` makes of the product.
    """
    n_out, n_in = weight_OI.shape
    assert weight_OI.is_contiguous(), "weights lie as they are stored"
    x_TI = x_TI.contiguous()
    y_TO = x_TI.new_empty(len(x_TI), n_out // (1 if activation is None else 2))
    library.function("sf_linear_bf16", "piipipip", level)(
        x_TI.data_ptr(),
        len(x_TI),
        n_in,
        weight_OI.data_ptr(),
        n_out,
        None if bias_O is None else bias_O.data_ptr(),
        ACTIVATIONS[activation],
        y_TO.data_ptr(),
    )
    return y_TO
