"""Rounds weights to the nearest of 8, 16 or 256 numbers, each row or group of a row with its own scale.

Works on CPU and CUDA tensors of any float dtype, some rows at a time: beside its results it needs little
memory, however large the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sailfish.base.errors import BuildError
from sailfish.kernels.reference.quantised import EIGHT_BITS

Format8 = Literal["int8", "fp8"]

LARGEST_8: dict[Format8, float] = {"int8": 127.0, "fp8": 448.0}
"""What the largest absolute value of a row is stored as."""
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Ranges tried for a group, as shares of its largest absolute value. Weights are near normal: of 128 of them
the extremes are so rare that finer steps gain more than cutting them loses."""
OCTAVE = tuple(2 ** (k / 16) for k in range(16))
"""What scales of FP8 are multiplied with: numbers of each size are as far apart, but for which of them are
hit. The best of these has 11% less squared error than the first on a small Llama's weights."""
_CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 25}
"""Weights worked on at a time: what fits the CPU's caches, and what fills a GPU."""


def quantise_int4(
    weight_OI: Tensor,
    group: int | None,
    symmetric: bool = True,
    *,
    search: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (code_OI uint8 of 0..15, scale_OG, zero_OG or None) as `quantise_int` does in 4 bits."""
    return quantise_int(weight_OI, group, symmetric, search=search, dtype=dtype)


def quantise_int(
    weight_OI: Tensor,
    group: int | None,
    symmetric: bool = True,
    *,
    bits: int = 4,
    search: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (code_OI uint8 below 2^bits, scale_OG, zero_OG or None): w is about (code - zero) * scale.

    `group` inputs share a scale, None: all of a row; the last group of a row may be shorter. Scales are in
    `dtype` and may be negative: the side of a group that reaches farther gets the code that has no
    counterpart, -8 of 4 bits. Symmetric weights have no zero_OG, 2^(bits - 1) means zero; else it holds
    whole numbers in `dtype`.
    With `search` each group takes the scale of least squared error among a few, else the one that cuts
    nothing off. BuildError if a weight is not finite.
    """
    n_out, n_in = weight_OI.shape
    group = n_in if group is None else group
    n_groups = -(-n_in // group)
    code_OI = torch.empty_like(weight_OI, dtype=torch.uint8)
    scale_OG = weight_OI.new_empty((n_out, n_groups), dtype=dtype)
    zero_OG = None if symmetric else torch.empty_like(scale_OG)
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    # In a symmetric group a range so much wider than its farther side loses nothing of the other side either.
    whole, *cut = (middle / (middle - 1), *_CLIPS) if symmetric else _CLIPS
    ranges = (whole, *cut) if search else (whole,)
    for rows in _chunks(weight_OI):
        w_OGI = F.pad(weight_OI[rows].float(), (0, n_groups * group - n_in)).view(-1, n_groups, group)
        scale, zero = (_symmetric if symmetric else _asymmetric)(w_OGI, ranges, top, dtype)
        code_OGI = _codes(w_OGI, scale, zero, top, exact=True)
        code_OI[rows] = code_OGI.flatten(1)[:, :n_in].to(torch.uint8)
        scale_OG[rows] = scale.squeeze(2).to(dtype)
        if zero_OG is not None:
            zero_OG[rows] = zero.squeeze(2).to(dtype)
    _refuse_infinite(scale_OG)
    return code_OI, scale_OG, zero_OG


def quantise_8(
    weight_OI: Tensor,
    to: Format8,
    *,
    multiples: Sequence[float] = (1.0,),
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Return (values_OI int8 or float8_e4m3fn, scale_O in `dtype`): w is about value * scale.

    The scale that makes a row's largest absolute value 127 (int8) or 448 (fp8) is multiplied with each of
    `multiples`, and that of least squared error is taken; a row of zeros has scale 1. BuildError if a weight
    is not finite.
    """
    values_OI = torch.empty_like(weight_OI, dtype=EIGHT_BITS[to])
    scale_O = weight_OI.new_empty(len(weight_OI), dtype=dtype)
    for rows in _chunks(weight_OI):
        w_OI = weight_OI[rows].float()
        largest_O = w_OI.abs().amax(1)
        # By a tensor: by a number, CUDA multiplies with the reciprocal, which rounds otherwise than the CPU.
        least_O = largest_O / torch.full_like(largest_O, LARGEST_8[to])
        scale = _best_8(w_OI, [_rounded(least_O * multiple, dtype) for multiple in multiples], to)
        values_OI[rows] = _values_8(w_OI, scale, to)
        scale_O[rows] = scale
    _refuse_infinite(scale_O)
    return values_OI, scale_O


def restore_int4(code_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, group: int | None) -> Tensor:
    """Return the float32 weights [O, I] that codes, scales and zeros of 4 bits stand for."""
    return restore_int(code_OI, scale_OG, zero_OG, group)


def restore_int(
    code_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, group: int | None, *, bits: int = 4
) -> Tensor:
    """Return the float32 weights [O, I] that codes, scales and zeros stand for."""
    n_in = code_OI.shape[1]
    group = n_in if group is None else group
    zero = 2 ** (bits - 1) if zero_OG is None else _spread(zero_OG, group, n_in)
    return (code_OI.float() - zero) * _spread(scale_OG, group, n_in)


def restore_8(values_OI: Tensor, scale_O: Tensor) -> Tensor:
    """Return the float32 weights [O, I] that values and scales stand for."""
    return values_OI.float() * scale_O[:, None]


def _symmetric(
    w_OGI: Tensor, ranges: tuple[float, ...], top: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    low, high = w_OGI.amin(2, keepdim=True), w_OGI.amax(2, keepdim=True)
    zero = (top + 1) // 2
    farthest = torch.where(-low >= high, low, high) / -zero
    middle = torch.full_like(farthest, zero)
    return _best(w_OGI, [(_rounded(farthest * share, dtype), middle) for share in ranges], top)


def _asymmetric(
    w_OGI: Tensor, ranges: tuple[float, ...], top: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    low, high = w_OGI.amin(2, keepdim=True).clamp(max=0), w_OGI.amax(2, keepdim=True).clamp(min=0)
    candidates = []
    for share in ranges:
        scale = _rounded((high - low) * (share / top), dtype)
        candidates.append((scale, (-low * share / scale).round_().clamp_(0, top)))
    return _best(w_OGI, candidates, top)


def _best(w_OGI: Tensor, candidates: list[tuple[Tensor, Tensor]], top: int) -> tuple[Tensor, Tensor]:
    """Return each group's (scale, zero) of least squared error, of equal ones the first."""
    scale, zero = candidates[0]
    if len(candidates) == 1:
        return scale, zero
    least = _squared_error(w_OGI, scale, zero, top)
    for other, its_zero in candidates[1:]:
        error = _squared_error(w_OGI, other, its_zero, top)
        is_less = error < least
        least = torch.where(is_less, error, least)
        scale = torch.where(is_less, other, scale)
        zero = torch.where(is_less, its_zero, zero)
    return scale, zero


def _squared_error(w_OGI: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    restored = _codes(w_OGI, scale, zero, top, exact=False).sub_(zero).mul_(scale)
    return restored.sub_(w_OGI).square_().sum(2, keepdim=True)


def _best_8(w_OI: Tensor, scales: Sequence[Tensor], to: Format8) -> Tensor:
    """Return each row's scale of least squared error, of equal ones the first."""
    if len(scales) == 1:
        return scales[0]
    restored = (restore_8(_values_8(w_OI, scale_O, to), scale_O) for scale_O in scales)
    error_SO = torch.stack([r_OI.sub_(w_OI).square_().sum(1) for r_OI in restored])
    return torch.stack(list(scales)).gather(0, error_SO.argmin(0, keepdim=True))[0]


def _values_8(w_OI: Tensor, scale_O: Tensor, to: Format8) -> Tensor:
    scaled = (w_OI / scale_O[:, None]).clamp_(-LARGEST_8[to], LARGEST_8[to])
    return (scaled.round() if to == "int8" else scaled).to(EIGHT_BITS[to])


def _codes(w_OGI: Tensor, scale: Tensor, zero: Tensor, top: int, *, exact: bool) -> Tensor:
    """Return codes as float32; a product with the reciprocal is faster, and off only next to a tie."""
    scaled = w_OGI / scale if exact else w_OGI * scale.reciprocal()
    return scaled.round_().add_(zero).clamp_(0, top)


def _rounded(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to what will be stored, so that codes are the nearest ones to the stored scale."""
    return _not_zero(scale.to(dtype).float())


def _not_zero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)


def _spread(x_OG: Tensor, group: int, n_in: int) -> Tensor:
    return x_OG.float().repeat_interleave(group, 1)[:, :n_in]


def _chunks(weight_OI: Tensor) -> Iterator[slice]:
    n_rows = max(1, _CHUNK_ELEMENTS[weight_OI.device.type] // weight_OI.shape[1])
    for start in range(0, len(weight_OI), n_rows):
        yield slice(start, start + n_rows)


def _refuse_infinite(scale: Tensor) -> None:
    if not bool(scale.isfinite().all()):
        raise BuildError("some weights are not finite, or too large for the scale's dtype")
