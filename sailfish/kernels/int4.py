"""The INT4 weight: its packed layout, packing, unpacking and the reference product.

A weight of O outputs and I inputs is cut into units of 16 outputs x 64 inputs, 512 contiguous bytes each;
the units of one strip of 16 outputs follow each other along the inputs. The unit is made for the tensor
cores' m16n8k16 product with the weight as its *A* operand (outputs are rows, tokens are columns), and for
wgmma m64k16, whose four warps each hold 16 such rows:

    lane l of a warp owns 16 contiguous bytes of a unit: 4 words, one for each 16 x 16 tile along the inputs
    nibble j of a word (bits 4j and up) is the low half of the lane's A register j, nibble j + 4 the high half

so `(word >> 4 * j) & 0x000f000f` is register j, two codes in its halves; or-ing 0x43004300 makes them the
bfloat16 pair 128 + code, exactly. With g = l // 4 and t = l % 4, register j holds row g + 8 * (j % 2) and
columns 2 * t + 8 * (j // 2) (low half) and the next (high half) of its tile.

For the CPU the bytes of a unit lie in lanes instead: 8 lines of 64 bytes, one for every 8 inputs. 32-bit lane
r of a line is row r; its four bytes' low nibbles are inputs 0 .. 3, their high nibbles 4 .. 7. A vector then
is one load, its lanes are rows, and four activations in 8 bits are broadcast to all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sailfish.base.errors import BuildError
from sailfish.kernels.contract import Int4Layout

GROUPS = (32, 64, 128)
"""Inputs that may share a scale, other than all of a row."""
STRIP = 16
"""Outputs of a unit."""
UNIT = 64
"""Inputs of a unit."""
ROWS = 64
"""Outputs are padded to a multiple of this: the rows of one wgmma."""
MIDDLE = 8
"""The code that means zero in a symmetric weight."""
ROUNDED = 128
"""Inputs whose activations share a scale where they are rounded to 8 bits, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4Weight:
    """A packed weight: w = (code - zero) * scale, padded with weights that are exactly 0."""

    packed: Tensor
    """int32 [O/16, I/64, 32, 4], O and I padded."""
    scale: Tensor
    """[O/16, G, 16] in the dtype of the activations, which CUDA kernels want in bfloat16 or float16; 0 in
    padded rows and groups."""
    zero: Tensor | None
    """[O/16, G, 16] in scale's dtype: the code that means zero. None: it is 8 everywhere."""
    n_out: int
    """Outputs, without padding."""
    n_in: int
    """Inputs, without padding."""
    group: int
    """Inputs that share a scale: 32, 64, 128, or all of the padded row."""
    layout: Int4Layout = "tensor_core"
    """How the bytes of a unit lie."""

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs, without padding."""
        return self.n_out, self.n_in


def pack(
    code_OI: Tensor,
    scale_OG: Tensor,
    zero_OG: Tensor | None,
    dtype: torch.dtype,
    layout: Int4Layout = "tensor_core",
) -> Int4Weight:
    """Pack codes (uint8, 0..15) with their scales, rounded to `dtype`, on the device they are on.

    The group is what G says: ceil(I / G) inputs, which must be 32, 64 or 128 unless G is 1. zero_OG holds
    whole numbers from 0 to 15, None means 8. BuildError where the shapes do not fit.
    """
    n_out, n_in = code_OI.shape
    n_groups = scale_OG.shape[1]
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise BuildError(f"INT4 scales are bfloat16, float16 or float32, not {dtype}")
    if code_OI.dtype != torch.uint8:
        raise BuildError(f"INT4 codes come as uint8, not {code_OI.dtype}")
    if scale_OG.shape != (n_out, n_groups) or (zero_OG is not None and zero_OG.shape != scale_OG.shape):
        raise BuildError(
            f"INT4 codes {tuple(code_OI.shape)} have scales {tuple(scale_OG.shape)}"
            + ("" if zero_OG is None else f" and zeros {tuple(zero_OG.shape)}"),
            hint="give both as (outputs, groups)",
        )
    width = _up(n_in, UNIT)
    if n_groups == 1:
        group = width
    else:
        fits = [group for group in GROUPS if -(-n_in // group) == n_groups]
        if not fits:
            raise BuildError(
                f"{n_in} inputs in {n_groups} groups are no INT4 layout",
                hint=f"use groups of {GROUPS}, or one",
            )
        group = fits[0]
        width = _up(width, group)
    rows, n_groups = _up(n_out, ROWS), width // group
    scale = _tiled(_padded(scale_OG, rows, n_groups, 0).to(dtype))
    zero = None if zero_OG is None else _tiled(_padded(zero_OG, rows, n_groups, MIDDLE).to(dtype))
    packed = _pack_codes(_padded_codes(code_OI, zero_OG, rows, width, group), layout)
    return Int4Weight(
        packed=packed, scale=scale, zero=zero, n_out=n_out, n_in=n_in, group=group, layout=layout
    )


def unpack(weight: Int4Weight) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (code_OI uint8, scale_OG, zero_OG or None) without padding: what `pack` was given."""
    n_groups = -(-weight.n_in // weight.group)
    code_OI = _unpack_codes(weight)[: weight.n_out, : weight.n_in].contiguous()
    scale_OG, zero_OG = (
        None if tiled is None else _flat(tiled)[: weight.n_out, :n_groups].contiguous()
        for tiled in (weight.scale, weight.zero)
    )
    assert scale_OG is not None
    return code_OI, scale_OG, zero_OG


def dequantise(weight: Int4Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weight [O, I] without padding; float32 holds it exactly."""
    code_OI = _unpack_codes(weight)
    zero: Tensor | int = MIDDLE if weight.zero is None else _flat(weight.zero).float()[..., None]
    code_OGI = code_OI.view(code_OI.shape[0], -1, weight.group)
    w_OGI = (code_OGI.float() - zero).mul_(_flat(weight.scale).float()[..., None])
    return w_OGI.view_as(code_OI)[: weight.n_out, : weight.n_in].to(dtype)


def linear_int4(x_TI: Tensor, weight: Int4Weight, bias_O: Tensor | None = None) -> Tensor:
    """Return x @ weight.T + bias in x's dtype, computed in float32: the law of every INT4 kernel."""
    bias = None if bias_O is None else bias_O.float()
    return F.linear(x_TI.float(), dequantise(weight), bias).to(x_TI.dtype)


def linear_w4a8(x_TI: Tensor, weight: Int4Weight, bias_O: Tensor | None = None) -> Tensor:
    """Return the product with activations rounded to 8 bits: the law of kernels that multiply integers.

    The inputs of a group, or ROUNDED of them where groups are longer, share a scale in each token: their
    largest absolute value / 127, or 1 if all are 0. Rounded to nearest, ties to even.
    """
    n_in = weight.n_in
    run = min(weight.group, ROUNDED)
    x_TGI = F.pad(x_TI.float(), (0, -n_in % run)).view(len(x_TI), -(-n_in // run), run)
    scale_TG = x_TGI.abs().amax(-1, keepdim=True) / 127
    scale_TG = torch.where(scale_TG == 0, 1, scale_TG)
    rounded_TI = (x_TGI / scale_TG).round().mul(scale_TG).flatten(1)[:, :n_in]
    return linear_int4(rounded_TI, weight, bias_O).to(x_TI.dtype)


def _pack_codes(code_OI: Tensor, layout: Int4Layout) -> Tensor:
    rows, width = code_OI.shape
    if layout == "lanes":
        code = code_OI.view(rows // STRIP, STRIP, width // 8, 2, 4)  # strip, row, line, half, input
        bytes_ = (code[..., 0, :] | code[..., 1, :] << 4).transpose(1, 2).contiguous()
        return bytes_.view(rows // STRIP, width // UNIT, 32, 16).view(torch.int32)
    # Axes: strip, half of 8 rows, row g, unit, tile, half of 8 columns, column pair t, one of the pair.
    code = code_OI.view(rows // STRIP, 2, 8, width // UNIT, 4, 2, 4, 2)
    pair = code[:, 0] | code[:, 1] << 4  # rows g and g + 8: neighbouring nibbles
    bytes_ = pair.permute(0, 2, 1, 5, 3, 6, 4).contiguous()  # strip, unit, g, t, tile | one of pair, half
    return bytes_.view(rows // STRIP, width // UNIT, 32, 16).view(torch.int32)


def _unpack_codes(weight: Int4Weight) -> Tensor:
    strips, units = weight.packed.shape[:2]
    bytes_ = weight.packed.contiguous().view(torch.uint8)
    if weight.layout == "lanes":
        line = bytes_.view(strips, units * 8, STRIP, 4).transpose(1, 2)
        return torch.stack((line & 15, line >> 4), dim=3).view(strips * STRIP, units * UNIT)
    pair = bytes_.view(strips, units, 8, 4, 4, 2, 2).permute(0, 2, 1, 4, 6, 3, 5)
    code = torch.stack((pair & 15, pair >> 4), dim=1)
    return code.reshape(strips * STRIP, units * UNIT)


def _padded_codes(code_OI: Tensor, zero_OG: Tensor | None, rows: int, width: int, group: int) -> Tensor:
    n_out, n_in = code_OI.shape
    if (rows, width) == (n_out, n_in):
        return code_OI.contiguous()
    code = code_OI.new_full((rows, width), MIDDLE)
    if zero_OG is not None and width > n_in:  # the last group's padding holds the code that is zero there
        code[:n_out, n_in : _up(n_in, group)] = zero_OG[:, -1:].to(torch.uint8)
    code[:n_out, :n_in] = code_OI
    return code


def _padded(x_OG: Tensor, rows: int, n_groups: int, value: float) -> Tensor:
    return F.pad(x_OG, (0, n_groups - x_OG.shape[1], 0, rows - x_OG.shape[0]), value=value)


def _tiled(x_OG: Tensor) -> Tensor:
    return x_OG.view(-1, STRIP, x_OG.shape[1]).transpose(1, 2).contiguous()


def _flat(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(-1, x.shape[1])


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
