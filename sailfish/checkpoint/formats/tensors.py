"""A tensor of a checkpoint as a numpy array, with the types that numpy lacks kept as their bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sailfish.base.errors import CheckpointError, ConfigError
from sailfish.checkpoint.safetensors_reader import Checkpoint

FloatType = Literal["BF16", "F16", "F32"]

_NUMPY: Mapping[str, str] = {
    "I8": "|i1", "U8": "|u1", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4",
    "BF16": "<u2", "F8_E4M3": "|u1",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredTensor:
    """One tensor: what safetensors would store, byte for byte."""

    dtype: str
    """As safetensors spells it."""
    array: NDArray[Any]
    """BF16 as uint16 and F8_E4M3 as uint8: their bits."""

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, StoredTensor)
            and self.dtype == other.dtype
            and self.array.shape == other.array.shape
            and self.array.tobytes() == other.array.tobytes()
        )

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, name: str) -> StoredTensor:
        """Map one tensor of a checkpoint, read-only; CheckpointError for a type no quantised layer has."""
        ref = checkpoint.tensors[name]
        if ref.dtype not in _NUMPY:
            raise CheckpointError(f"{name} is {ref.dtype}; quantised layers have {', '.join(_NUMPY)}")
        flat = np.frombuffer(checkpoint.bytes(name), dtype=_NUMPY[ref.dtype])
        return cls(dtype=ref.dtype, array=flat.reshape(ref.shape))

    @classmethod
    def from_floats(cls, values: NDArray[np.float32], dtype: FloatType) -> StoredTensor:
        """Store float32 values in a type that has each of them exactly; ConfigError if it has not."""
        stored = cls(dtype=dtype, array=_to_bits(values, dtype))
        if not np.array_equal(stored.floats(), values):
            raise ConfigError(
                f"scales are not exact in {dtype}",
                hint=f"round them to {dtype} before weights are rounded with them, or store another type",
            )
        return stored

    @classmethod
    def rounded(cls, values: NDArray[np.float32], dtype: FloatType, where: str) -> StoredTensor:
        """Store float32 values rounded to the nearest of a type, ties to even; ConfigError on overflow."""
        stored = cls(dtype=dtype, array=_to_bits(_nearest_bf16(values) if dtype == "BF16" else values, dtype))
        if not np.isfinite(stored.floats()).all():
            raise ConfigError(f"{where} has weights too large for {dtype}", hint="use another dtype")
        return stored

    def floats(self) -> NDArray[np.float32]:
        """Return the values of a BF16, F16 or F32 tensor, exactly."""
        if self.dtype == "BF16":
            return (self.array.astype(np.uint32) << 16).view(np.float32)
        assert self.dtype in ("F16", "F32"), self.dtype
        return self.array.astype(np.float32)


def _nearest_bf16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round to 8 bits of mantissa; what then follows them is 0."""
    bits = np.ascontiguousarray(values, "<f4").view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


def _to_bits(values: NDArray[np.float32], dtype: FloatType) -> NDArray[Any]:
    if dtype == "F32":
        return values.astype("<f4")
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype("<f2")
    return (np.ascontiguousarray(values, "<f4").view(np.uint32) >> 16).astype("<u2")
