"""Tables of rotary angles: plain, linear, Llama 3 and YaRN, in float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sailfish.checkpoint.model_config import RopeConfig


def rope_table(rope: RopeConfig, n_positions: int, device: torch.device) -> Tensor:
    """Return table_C2F: cos and sin of each position's angles, made on the CPU so that devices agree."""
    angle_CF = torch.arange(n_positions, dtype=torch.float32)[:, None] * frequencies(rope)
    return torch.stack((angle_CF.cos(), angle_CF.sin()), 1).mul_(rope.attention_factor).to(device)


def frequencies(rope: RopeConfig) -> Tensor:
    """Return the angle per position of each rotated pair (F)."""
    exponent_F = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32) / rope.rotary_dim
    frequency_F = 1.0 / rope.theta**exponent_F
    match rope.scaling:
        case "none":
            return frequency_F
        case "linear":
            return frequency_F / rope.factor
        case "llama3":
            return _llama3(frequency_F, rope)
        case "yarn":
            return _yarn(frequency_F, rope)


def _llama3(frequency_F: Tensor, rope: RopeConfig) -> Tensor:
    """Divide slow frequencies by the factor, keep fast ones, and blend between (Llama 3.1)."""
    turns_F = frequency_F * rope.original_context_tokens / (2 * math.pi)
    width = rope.high_freq_factor - rope.low_freq_factor
    keep_F = ((turns_F - rope.low_freq_factor) / width).clamp(0, 1)
    return (1 - keep_F) * frequency_F / rope.factor + keep_F * frequency_F


def _yarn(frequency_F: Tensor, rope: RopeConfig) -> Tensor:
    """Interpolate by pair, from none above beta_fast turns to all below beta_slow (Peng et al. 2023, 3.2)."""

    def pair_of(turns: float) -> float:
        length = rope.original_context_tokens / (turns * 2 * math.pi)
        return rope.rotary_dim * math.log(length) / (2 * math.log(rope.theta))

    low = max(math.floor(pair_of(rope.beta_fast)), 0)
    high = min(math.ceil(pair_of(rope.beta_slow)), rope.rotary_dim - 1)
    ramp_F = (torch.arange(len(frequency_F)) - low) / max(high - low, 0.001)
    interpolate_F = ramp_F.clamp(0, 1)
    return interpolate_F * frequency_F / rope.factor + (1 - interpolate_F) * frequency_F
