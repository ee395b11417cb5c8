"""References of the ops on 8-bit numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sailfish.kernels.contract import ActivationFormat, Quantised, Weight8

EIGHT_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""The dtype of each format of 8 bits."""
LARGEST = {"int8": 127.0, "fp8": 448.0}
"""What the largest absolute value of a token is stored as."""


def quantise(x_TI: Tensor, out: ActivationFormat) -> Quantised:
    """Meet `contract.Quantise`; takes any number of leading axes."""
    largest_T = x_TI.float().abs().amax(-1)
    # In float64, for on a GPU torch multiplies by the rounded reciprocal of a constant divisor.
    scale_T = torch.where(largest_T > 0, (largest_T.double() / LARGEST[out]).float(), 1.0)
    scaled = x_TI.float() / scale_T.unsqueeze(-1)
    values = scaled.round().to(torch.int8) if out == "int8" else scaled.to(torch.float8_e4m3fn)
    return Quantised(values, scale_T, x_TI.dtype)


def quantise_static(x_TI: Tensor, out: ActivationFormat, scale_1: Tensor) -> Quantised:
    """Meet `contract.QuantiseStatic`."""
    scaled = x_TI.float() / scale_1
    if out == "int8":
        values = scaled.round_().clamp_(-128, 127).to(torch.int8)
    else:
        values = scaled.clamp_(-LARGEST["fp8"], LARGEST["fp8"]).to(torch.float8_e4m3fn)
    return Quantised(values, scale_1.expand(len(x_TI)).contiguous(), x_TI.dtype)


def formatted(x_TI: Tensor, out: ActivationFormat) -> Tensor | Quantised:
    """Return x as it is, or quantised, as a producer of activations is asked to."""
    return x_TI if out == "plain" else quantise(x_TI, out)


def linear_8(x: Quantised, weight: Weight8, bias_O: Tensor | None) -> Tensor:
    """Meet `contract.Linear8`. Float64 holds every integer sum of 8-bit products exactly."""
    y_TO = (x.values_TI.double() @ weight.values_OI.double().T).float()
    y_TO = y_TO * x.scale_T[:, None] * weight.scale_O
    return (y_TO if bias_O is None else y_TO + bias_O.float()).to(x.dtype)


def embed_int8(token_T: Tensor, weight: Weight8, scale: float, dtype: torch.dtype) -> Tensor:
    """Meet `contract.EmbedInt8`."""
    scale_T1 = weight.scale_O[token_T].unsqueeze(-1) * scale
    return (F.embedding(token_T, weight.values_OI).float() * scale_T1).to(dtype)
