"""References of the ops that treat each token alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float, plus_one: bool) -> Tensor:
    """Meet `contract.RmsNorm`."""
    x = x_TD.float()
    scale_D = weight_D.float() + 1.0 if plus_one else weight_D.float()
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * scale_D).to(x_TD.dtype)


def add_rms_norm(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float, plus_one: bool
) -> tuple[Tensor, Tensor]:
    """Meet `contract.AddRmsNorm`."""
    sum_TD = x_TD + residual_TD
    return rms_norm(sum_TD, weight_D, eps, plus_one), sum_TD


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """Meet `contract.LinearOp`."""
    return F.linear(x_TI, weight_OI, bias_O)


def rope(
    q_THE: Tensor, k_TKE: Tensor, table_C2F: Tensor, position_T: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Meet `contract.Rope`."""
    cos_T1F, sin_T1F = table_C2F.index_select(0, position_T).unsqueeze(1).unbind(2)
    return _rotate(q_THE, cos_T1F, sin_T1F, interleaved), _rotate(k_TKE, cos_T1F, sin_T1F, interleaved)


def _rotate(x_THE: Tensor, cos_T1F: Tensor, sin_T1F: Tensor, interleaved: bool) -> Tensor:
    n_pairs = cos_T1F.shape[-1]
    turning, still = x_THE[..., : 2 * n_pairs].float(), x_THE[..., 2 * n_pairs :]
    if interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]
    else:
        a, b = turning[..., :n_pairs], turning[..., n_pairs:]
    turned = (a * cos_T1F - b * sin_T1F, b * cos_T1F + a * sin_T1F)
    joined = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat((joined.to(x_THE.dtype), still), -1)


def kv_write(
    k_TKE: Tensor, v_TKE: Tensor, k_cache_NPKE: Tensor, v_cache_NPKE: Tensor, slot_T: Tensor
) -> None:
    """Meet `contract.KvWrite`."""
    k_cache_NPKE.flatten(0, 1).index_copy_(0, slot_T, k_TKE)
    v_cache_NPKE.flatten(0, 1).index_copy_(0, slot_T, v_TKE)


def act_mul(gate_up_T2M: Tensor, activation: str) -> Tensor:
    """Meet `contract.ActMul`."""
    gate_TM, up_TM = gate_up_T2M.chunk(2, -1)
    return ACTIVATIONS[activation](gate_TM) * up_TM


def embed(token_T: Tensor, weight_VD: Tensor, scale: float) -> Tensor:
    """Meet `contract.Embed`."""
    x_TD = F.embedding(token_T, weight_VD)
    return x_TD if scale == 1.0 else x_TD * torch.tensor(scale, dtype=x_TD.dtype)


def softcap(x_SV: Tensor, cap: float) -> Tensor:
    """Meet `contract.Softcap`."""
    return torch.tanh(x_SV / cap) * cap
