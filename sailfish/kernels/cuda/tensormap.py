"""Describes tensors to Hopper's bulk copy engine, which copies boxes of them. No torch."""

from __future__ import annotations

import ctypes
from functools import lru_cache

from sailfish.base.errors import EngineError
from sailfish.kernels.cuda.driver import _check, _driver

BYTES = 128
_ALIGNMENT = 64
_DATA_TYPE = {"uint8": 0, "int32": 3, "float16": 6, "bfloat16": 9}
_ITEM_BYTES = {"uint8": 1, "int32": 4, "float16": 2, "bfloat16": 2}
_SWIZZLE = {64: 2, 128: 3}
_FETCH_128 = 2
"""What the L2 cache fetches at once: a row of most boxes. With 256 bytes, decode attention streams its cache
at 4,169 instead of 4,517 GB/s on an H200."""


def matrix(
    address: int, dtype: str, rows: int, columns: int, row_bytes: int, box: tuple[int, int], swizzled: bool
) -> bytes:
    """Return the map of a row-major matrix from which boxes of (rows, columns) are copied."""
    return tensor(address, dtype, (rows, columns), (row_bytes,), box, swizzled)


@lru_cache(maxsize=8192)
def tensor(
    address: int,
    dtype: str,
    shape: tuple[int, ...],
    strides_bytes: tuple[int, ...],
    box: tuple[int, ...],
    swizzled: bool,
) -> bytes:
    """Return the map of a tensor, its last axis contiguous, from which boxes are copied.

    shape, box: by axis; strides_bytes: of all axes but the last. What lies outside the tensor is read as
    zeros and never written. The address and the strides are multiples of 16. `swizzled`: the box's rows
    are 128 bytes, and lie in shared memory with the index of each 16 bytes xor-ed by the row's index
    modulo 8, which spares the banks conflicts; or they are 64 bytes, xor-ed by half of it.
    """
    if address % 16 or any(stride % 16 for stride in strides_bytes):
        raise EngineError(f"a tensor at {address:#x} with strides {strides_bytes} is not aligned to 16 bytes")
    space = (ctypes.c_ubyte * (BYTES + _ALIGNMENT))()
    start = -ctypes.addressof(space) % _ALIGNMENT
    n = len(shape)
    encode = _driver().cuTensorMapEncodeTiled
    status = encode(
        ctypes.c_void_p(ctypes.addressof(space) + start),
        ctypes.c_int(_DATA_TYPE[dtype]),
        ctypes.c_uint(n),
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * n)(*reversed(shape)),
        (ctypes.c_uint64 * (n - 1))(*reversed(strides_bytes)),
        (ctypes.c_uint32 * n)(*reversed(box)),
        (ctypes.c_uint32 * n)(*(1,) * n),
        ctypes.c_int(0),
        ctypes.c_int(_SWIZZLE[box[-1] * _ITEM_BYTES[dtype]] if swizzled else 0),
        ctypes.c_int(_FETCH_128),
        ctypes.c_int(0),
    )
    _check(status)
    return bytes(space[start : start + BYTES])


def argument(*maps: bytes) -> ctypes.Array[ctypes.c_ubyte]:
    """Return maps as one kernel argument, a struct of them."""
    return (ctypes.c_ubyte * (BYTES * len(maps))).from_buffer_copy(b"".join(maps))
