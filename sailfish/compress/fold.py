"""Moves a factor per channel from a layer's inputs into its weights, and out of whatever produces them.

The producers divide, the consumers multiply: y = (W diag(s)) (x / s). Nothing is computed at run time.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scale_inputs(weight_OI: Tensor, scale_I: Tensor) -> Tensor:
    """Return float32 (or wider) weights that take inputs divided by scale_I."""
    return weight_OI.to(torch.promote_types(weight_OI.dtype, scale_I.dtype)) * scale_I


def divide_outputs(weight_OI: Tensor, bias_O: Tensor | None, scale_O: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return (weight_OI, bias_O) of a linear layer whose outputs are divided by scale_O.

    Exact for every use of the outputs that is linear in each of them: up before the product with the
    gate, values before the output projection.
    """
    weight = weight_OI.to(torch.promote_types(weight_OI.dtype, scale_O.dtype)) / scale_O[:, None]
    return weight, None if bias_O is None else bias_O.to(weight.dtype) / scale_O


def divide_norm(
    weight_D: Tensor, bias_D: Tensor | None, scale_D: Tensor, *, plus_one: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return (weight_D, bias_D, scale_D) of a norm whose outputs are divided by the returned scale.

    Weight and bias keep their dtype. The returned scale makes good what rounding the new weight to it
    changed, so that consumers that are scaled by it give the old outputs; a bias is rounded once more.
    With `plus_one` the norm multiplies by 1 + weight. A channel of weight 0 is scaled as asked.
    """
    shift = 1.0 if plus_one else 0.0
    old = weight_D.to(scale_D.dtype) + shift
    folded = (old / scale_D - shift).to(weight_D.dtype)
    new = folded.to(scale_D.dtype) + shift
    is_lost = (new == 0) | (old == 0)
    folded = torch.where(is_lost & (old != 0), weight_D, folded)  # too small for the dtype: left alone
    scale = torch.where(is_lost, torch.where(old == 0, scale_D, 1.0), old / new)
    bias = None if bias_D is None else (bias_D.to(scale_D.dtype) / scale).to(bias_D.dtype)
    return folded, bias, scale


def scale_hessian(hessian_II: Tensor, scale_I: Tensor) -> Tensor:
    """Return the mean of x x^T of inputs divided by scale_I."""
    return hessian_II / scale_I / scale_I[:, None]


def share_over_queries(scale_I: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """Return scales of the output projection's inputs that grouped-query values can be divided by.

    All query heads of a kv head read the same values: they share the geometric mean of their scales.
    """
    scale_KQE = scale_I.view(n_kv_heads, n_heads // n_kv_heads, -1)
    return scale_KQE.log().mean(1, keepdim=True).exp().expand_as(scale_KQE).reshape(-1)


def of_values(scale_I: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """Return the scales of the value projection's outputs, of shared scales of the output projection."""
    return scale_I.view(n_kv_heads, n_heads // n_kv_heads, -1)[:, 0].reshape(-1)
