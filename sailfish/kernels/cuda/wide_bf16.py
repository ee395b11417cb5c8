"""Multiplies many tokens with a bfloat16 weight and gates the result on its way out, on Hopper."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sailfish.kernels.cuda import elementwise, linear8, program
from sailfish.kernels.cuda.linear8 import SHAPES
from sailfish.kernels.cuda.program import Variant


def linear_bf16(
    x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """Return x @ weight.T + bias, [T, O] in bfloat16; inputs and outputs are multiples of 8.

    With an activation, "silu" or "gelu_tanh": activation(gate) * up of it, [T, O / 2], for weights whose
    rows alternate by eights of gate and up. Each of gate, up and activation(gate) is rounded to bfloat16.
    Rows of x begin at multiples of 16 bytes. Other cards take torch's product.
    """
    if program.architecture() != "sm_90a":
        y_TO = F.linear(x_TI, weight_OI, bias_O)
        return y_TO if activation is None else cast(Tensor, elementwise.act_mul(y_TO, activation))
    n_out, n_in = weight_OI.shape
    assert activation is None or n_out % 16 == 0
    y_TO = x_TI.new_empty(len(x_TI), n_out if activation is None else n_out // 2)
    if len(x_TI):
        shape, splits = linear8.choose(len(x_TI), n_out, 2 * n_in)
        linear8.run(x_TI, weight_OI, (None, None, bias_O), y_TO, shape, splits, activation)
    return y_TO


VARIANTS = tuple(Variant("wide8.cu", shape.defines(torch.bfloat16), only=("sm_90a",)) for shape in SHAPES)
"""Every way the source is compiled for bfloat16."""
