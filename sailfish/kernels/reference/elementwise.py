"""References of the ops that treat each token alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sailfish.kernels.contract import ActivationFormat, KvLayer, Quantised, gated_run
from sailfish.kernels.reference.quantised import formatted, quantise

ACTIVATIONS = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def rms_norm(
    x_TD: Tensor, weight_D: Tensor, eps: float, plus_one: bool, out: ActivationFormat = "plain"
) -> Tensor | Quantised:
    """Meet `contract.RmsNorm`."""
    return formatted(_norm(x_TD, weight_D, eps, plus_one), out)


def add_rms_norm(
    x_TD: Tensor,
    residual_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    plus_one: bool,
    out: ActivationFormat = "plain",
) -> tuple[Tensor | Quantised, Tensor]:
    """Meet `contract.AddRmsNorm`."""
    sum_TD = x_TD + residual_TD
    return rms_norm(sum_TD, weight_D, eps, plus_one, out), sum_TD


def _norm(x_TD: Tensor, weight_D: Tensor, eps: float, plus_one: bool) -> Tensor:
    x = x_TD.float()
    scale_D = weight_D.float() + 1.0 if plus_one else weight_D.float()
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * scale_D).to(x_TD.dtype)


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """Meet `contract.LinearOp`."""
    return F.linear(x_TI, weight_OI, bias_O)


def rope_write(
    qkv_TX: Tensor,
    n_heads: int,
    q_norm_E: Tensor | None,
    k_norm_E: Tensor | None,
    eps: float,
    plus_one: bool,
    table_C2F: Tensor,
    position_T: Tensor,
    interleaved: bool,
    kv: KvLayer,
    slot_T: Tensor,
) -> Tensor:
    """Meet `contract.RopeWrite`."""
    n_kv_heads, head_dim = kv.k_NPKE.shape[2:]
    heads = (n_heads, n_kv_heads, n_kv_heads)
    q_THE, k_TKE, v_TKE = qkv_TX.view(len(qkv_TX), sum(heads), head_dim).split_with_sizes(heads, 1)
    if q_norm_E is not None and k_norm_E is not None:
        q_THE, k_TKE = _norm(q_THE, q_norm_E, eps, plus_one), _norm(k_TKE, k_norm_E, eps, plus_one)
    cos_T1F, sin_T1F = table_C2F.index_select(0, position_T).unsqueeze(1).unbind(2)
    q_THE, k_TKE = (_rotate(x, cos_T1F, sin_T1F, interleaved) for x in (q_THE, k_TKE))
    if kv.k_scale_NPK is not None and kv.v_scale_NPK is not None:
        _write_8(k_TKE, kv.k_NPKE, kv.k_scale_NPK, slot_T)
        _write_8(v_TKE, kv.v_NPKE, kv.v_scale_NPK, slot_T)
    else:
        kv.k_NPKE.flatten(0, 1).index_copy_(0, slot_T, k_TKE)
        kv.v_NPKE.flatten(0, 1).index_copy_(0, slot_T, v_TKE)
    return q_THE


def _write_8(x_TKE: Tensor, cache_NPKE: Tensor, scale_NPK: Tensor, slot_T: Tensor) -> None:
    """Write values in 8 bits with their scales, as bytes: index_copy_ takes no float8."""
    stored = quantise(x_TKE, "int8" if cache_NPKE.dtype == torch.int8 else "fp8")
    scale_NPK.flatten(0, 1).index_copy_(0, slot_T, stored.scale_T)
    cache_NPKE.flatten(0, 1).view(torch.int8).index_copy_(0, slot_T, stored.values_TI.view(torch.int8))


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


def act_mul(gate_up_T2M: Tensor, activation: str, out: ActivationFormat = "plain") -> Tensor | Quantised:
    """Meet `contract.ActMul`."""
    d_mlp = gate_up_T2M.shape[-1] // 2
    run = gated_run(d_mlp)
    gate, up = gate_up_T2M.view(*gate_up_T2M.shape[:-1], d_mlp // run, 2, run).unbind(-2)
    # Of a copy, for torch is slow at functions of short runs: on a CPU twice as fast, copy included.
    y = ACTIVATIONS[activation](gate.contiguous()) * up
    return formatted(y.flatten(-2), out)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return activation(gate) * up in the inputs' dtype."""
    return ACTIVATIONS[activation](gate) * up


def embed(token_T: Tensor, weight_VD: Tensor, scale: float) -> Tensor:
    """Meet `contract.Embed`."""
    x_TD = F.embedding(token_T, weight_VD)
    return x_TD if scale == 1.0 else x_TD * torch.tensor(scale, dtype=x_TD.dtype)


def softcap(x_SV: Tensor, cap: float) -> Tensor:
    """Meet `contract.Softcap`."""
    return torch.tanh(x_SV / cap) * cap
