"""Reference of the mixture of experts: every expert sees every token, then the router's weights decide."""

from __future__ import annotations

import torch
from torch import Tensor

from sailfish.kernels.reference.elementwise import gated


def route(router_TX: Tensor, n_active: int, normalise: bool) -> tuple[Tensor, Tensor]:
    """Return the weights (float32) and ids of each token's experts, both [T, n_active]."""
    weight_TA, expert_TA = router_TX.float().softmax(-1).topk(n_active, -1)
    if normalise:
        weight_TA = weight_TA / weight_TA.sum(-1, keepdim=True)
    return weight_TA, expert_TA


def moe(
    x_TD: Tensor,
    router_TX: Tensor,
    gate_up_X2MD: Tensor,
    down_XDM: Tensor,
    n_active: int,
    normalise: bool,
    activation: str,
) -> Tensor:
    """Meet `contract.Moe`."""
    weight_TA, expert_TA = route(router_TX, n_active, normalise)
    share_TX = torch.zeros_like(router_TX, dtype=torch.float32).scatter_(1, expert_TA, weight_TA)
    out_TD = torch.zeros_like(x_TD, dtype=torch.float32)
    for x, (gate_up_2MD, down_DM) in enumerate(zip(gate_up_X2MD, down_XDM, strict=True)):
        gate_TM, up_TM = (x_TD.float() @ gate_up_2MD.float().T).chunk(2, -1)
        mlp_TD = gated(gate_TM, up_TM, activation) @ down_DM.float().T
        out_TD += mlp_TD * share_TX[:, x, None]
    return out_TD.to(x_TD.dtype)
