"""Mixture of experts with tokens sorted by expert, so that each expert with tokens runs once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sailfish.kernels.reference.elementwise import gated
from sailfish.kernels.reference.moe import route


def sorted_moe(
    x_TD: Tensor,
    router_TX: Tensor,
    gate_up_X2MD: Tensor,
    down_XDM: Tensor,
    n_active: int,
    normalise: bool,
    activation: str,
) -> Tensor:
    """Meet `contract.Moe`; waits for the device once, to learn how many tokens each expert has."""
    weight_TA, expert_TA = route(router_TX, n_active, normalise)
    order_R = expert_TA.flatten().argsort(stable=True)
    n_rows = expert_TA.flatten().bincount(minlength=len(gate_up_X2MD)).tolist()
    y_RD = x_TD.new_empty(len(order_R), x_TD.shape[1])
    start = 0
    for x, n in enumerate(n_rows):
        if n == 0:
            continue
        rows = order_R[start : start + n]
        gate_RM, up_RM = F.linear(x_TD[rows // n_active], gate_up_X2MD[x]).chunk(2, -1)
        y_RD[rows] = F.linear(gated(gate_RM, up_RM, activation), down_XDM[x])
        start += n
    y_TAD = y_RD.view(*expert_TA.shape, x_TD.shape[1])
    return torch.einsum("ta,tad->td", weight_TA.to(x_TD.dtype), y_TAD)
