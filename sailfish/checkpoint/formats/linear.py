"""A quantised linear layer as numbers, free of any tool's way to pack them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sailfish.base.errors import CheckpointError
from sailfish.checkpoint.formats.tensors import FloatType

FLOAT8_NAN = 0x7F
"""The bits of E4M3's NaN, whatever the sign (Micikevicius et al. 2022, table 1); it has no infinity."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantisedLinear:
    """A weight of O outputs and I inputs: w = (code - zero) * scale; G groups of inputs share a scale."""

    code_OI: NDArray[np.uint8]
    """Whole numbers below 2^bits, inputs in the model's order; the bits of E4M3 numbers where is_float."""
    scale_OG: NDArray[np.float32]
    """May be negative; G is 1 where a row has one scale."""
    zero_OG: NDArray[np.uint8] | None
    """The code that means zero. None: it is 2^(bits - 1) everywhere (and nothing where is_float)."""
    g_idx: NDArray[np.int32] | None
    """[I] the group of each input. None: each `group` inputs in a row are one."""
    group: int
    """Inputs that share a scale; the last group may have fewer."""
    bits: int
    scale_dtype: FloatType
    """The type that the scales are exact in, and are stored as."""
    is_float: bool = False
    input_scale: NDArray[np.float32] | None = None
    """[1] the static scale of the inputs, where they are rounded with one."""

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        n_out, n_in = self.code_OI.shape
        return n_out, n_in

    @property
    def zero_points(self) -> NDArray[np.uint8]:
        """[O, G] the code that means zero, whether or not zero_OG says it."""
        middle = 1 << (self.bits - 1)
        return np.full(self.scale_OG.shape, middle, np.uint8) if self.zero_OG is None else self.zero_OG

    @property
    def group_of_input(self) -> NDArray[np.int32]:
        """[I] the group of each input, whether or not g_idx says it."""
        return np.arange(self.shape[1], dtype=np.int32) // self.group if self.g_idx is None else self.g_idx

    @property
    def order(self) -> NDArray[np.int64] | None:
        """[I] the inputs sorted by their group, stably; None where they are sorted already."""
        if self.g_idx is None:
            return None
        order = np.argsort(self.g_idx, kind="stable")
        return None if np.array_equal(order, np.arange(len(order))) else order

    def dequantise(self) -> NDArray[np.float32]:
        """Return the weight [O, I] in float32: exact but for the rounding of one product."""
        group_of_I = self.group_of_input
        if self.is_float:
            value_OI = _float8_values()[self.code_OI]
        else:
            value_OI = self.code_OI.astype(np.float32) - self.zero_points.astype(np.float32)[:, group_of_I]
        return value_OI * self.scale_OG[:, group_of_I]


def check_linear(linear: QuantisedLinear, where: str) -> QuantisedLinear:
    """Return the layer if its numbers are sound, else raise CheckpointError."""
    if not np.isfinite(linear.scale_OG).all():
        raise CheckpointError(f"{where}: a scale is not a finite number")
    if linear.is_float and bool(((linear.code_OI & FLOAT8_NAN) == FLOAT8_NAN).any()):
        raise CheckpointError(f"{where}: a weight is not a number")
    if linear.input_scale is not None and not (
        np.isfinite(linear.input_scale).all() and (linear.input_scale > 0).all()
    ):
        raise CheckpointError(f"{where}: input_scale is {linear.input_scale}; it must be finite and positive")
    return linear


def check_g_idx(g_idx: NDArray[np.int32], group: int, n_groups: int, where: str) -> NDArray[np.int32] | None:
    """Return g_idx, None if it says what no g_idx says; each group but the last has `group` inputs."""
    usual = np.arange(len(g_idx), dtype=np.int32) // group
    if np.array_equal(g_idx, usual):
        return None
    if not np.array_equal(np.sort(g_idx), usual) or usual[-1] >= n_groups:
        raise CheckpointError(f"{where}: g_idx does not give {group} inputs to each group but the last")
    return np.ascontiguousarray(g_idx, np.int32)


def _float8_values() -> NDArray[np.float32]:
    """Return the value of each of the 256 E4M3 bit patterns; NaN where it has none."""
    bits = np.arange(256)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    size[bits & FLOAT8_NAN == FLOAT8_NAN] = np.nan
    return np.where(bits < 128, size, -size).astype(np.float32)
