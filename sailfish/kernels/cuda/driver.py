"""Loads machine code and launches its kernels through the CUDA driver. No torch."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from sailfish.base.errors import EngineError

launches: Counter[str] = Counter()
"""Launches of each kernel since the process began; a launch that a graph captures counts once."""

_PROGRAMMATIC_STREAM_SERIALIZATION = 6
_CLUSTER_DIMENSION = 4
_MAX_DYNAMIC_SHARED_BYTES = 8
_DEFAULT_SHARED_BYTES = 48 << 10
_MAX_ATTRIBUTES = 2


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("n_attributes", ctypes.c_uint),
    )


class Kernel:
    """One kernel of loaded machine code, launched on a stream with plain values."""

    def __init__(self, library: Library, name: str, label: str, *, can_wait: bool = False) -> None:
        """Find `name` in the library; `label` is what its launches are counted under.

        can_wait: the code was compiled for cards on which kernels may begin early, and waits where it must.
        """
        self._library = library  # keeps the code loaded
        self._handle = ctypes.c_void_p()
        self._label = label
        self._can_wait = can_wait
        self._shared_bytes = _DEFAULT_SHARED_BYTES
        _check(_driver().cuLibraryGetKernel(ctypes.byref(self._handle), library.handle, name.encode()))

    def launch(
        self,
        grid: Sequence[int],
        block: int,
        arguments: Sequence[Any],
        stream: int,
        *,
        shared_bytes: int = 0,
        after: bool = False,
        cluster: int = 1,
    ) -> None:
        """Launch asynchronously.

        arguments: a tensor or None is passed as a pointer, an int as 32 bits, a float as 32 bits, a
        ctypes value as it is. `after`: the kernel begins before the one ahead of it on the stream has
        ended, and itself waits for it (`griddepcontrol.wait`) before it reads that one's results: a
        kernel that never waits must not ask for this; one whose code cannot wait begins in its turn.
        `cluster`: blocks of grid x that form a cluster.
        """
        if shared_bytes > self._shared_bytes:
            self._allow(shared_bytes)
        values = [_value(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        attributes = (_Attribute * _MAX_ATTRIBUTES)()
        n = 0
        if after and self._can_wait:
            attributes[n].id, attributes[n].value[0] = _PROGRAMMATIC_STREAM_SERIALIZATION, 1
            n += 1
        if cluster > 1:
            attributes[n].id, attributes[n].value[:3] = _CLUSTER_DIMENSION, (cluster, 1, 1)
            n += 1
        config = _Config((*grid, 1, 1)[:3], (block, 1, 1), shared_bytes, stream, attributes, n)
        _check(_driver().cuLaunchKernelEx(ctypes.byref(config), self._handle, pointers, None))
        launches[self._label] += 1

    def _allow(self, shared_bytes: int) -> None:
        driver, device = _driver(), ctypes.c_int()
        _check(driver.cuCtxGetDevice(ctypes.byref(device)))
        _check(driver.cuKernelSetAttribute(_MAX_DYNAMIC_SHARED_BYTES, shared_bytes, self._handle, device))
        self._shared_bytes = shared_bytes


class Library:
    """Machine code that the driver holds, for every context of the process."""

    def __init__(self, code: bytes) -> None:
        """Load a cubin, or PTX, which the driver then compiles."""
        self.handle = ctypes.c_void_p()
        nothing = (None, None, 0, None, None, 0)
        _check(_driver().cuLibraryLoadData(ctypes.byref(self.handle), code, *nothing))


def _value(argument: Any) -> Any:
    if isinstance(argument, int):  # bool included
        return ctypes.c_int(argument)
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    if argument is None:
        return ctypes.c_void_p()
    if hasattr(argument, "data_ptr"):
        return ctypes.c_void_p(argument.data_ptr())
    return argument


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise EngineError(
            "the CUDA driver is not installed", hint="run on a machine with an NVIDIA GPU, or use the CPU"
        ) from None


def _check(status: int) -> None:
    if status != 0:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise EngineError(f"CUDA failed ({status}): {(text.value or b'unknown error').decode()}")
