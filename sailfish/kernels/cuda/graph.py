"""Captures launches as a CUDA graph that replays them all at once, and counts its kernels by name."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sailfish.kernels.cuda.driver import _check, _driver

_KERNEL_NODE = 0
_COPY_NODE = 1


def new_pool() -> Any:
    """Return a pool of device memory for graphs that never run at the same time."""
    return torch.cuda.graph_pool_handle()


class Graph:
    """What one call of a function launched, to be launched again."""

    def __init__(self, function: Callable[[], Tensor], pool: Any) -> None:
        """Capture a call on the current stream; `function` must have run on that stream before.

        Temporaries, and what the function returns, come from `pool`, which graphs that never run at the
        same time share.
        """
        self._graph = torch.cuda.CUDAGraph(keep_graph=True)
        self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            self._result = _borrowed(function())
        finally:
            self._graph.capture_end()
        self._graph.instantiate()

    def replay(self) -> Tensor:
        """Launch everything on the current stream.

        Returns what the function returned, which lasts until another graph of the pool is replayed.
        """
        self._graph.replay()
        return self._result

    def kernels(self) -> Counter[str]:
        """Return how often each kernel is launched in one replay."""
        handle = ctypes.c_void_p(self._graph.raw_cuda_graph())
        n_nodes = ctypes.c_size_t()
        _check(_driver().cuGraphGetNodes(handle, None, ctypes.byref(n_nodes)))
        nodes = (ctypes.c_void_p * n_nodes.value)()
        _check(_driver().cuGraphGetNodes(handle, nodes, ctypes.byref(n_nodes)))
        return Counter(_node_name(ctypes.c_void_p(node)) for node in nodes)


class _Place:
    """A place in device memory, as other libraries describe theirs."""

    def __init__(self, tensor: Tensor) -> None:
        assert tensor.is_contiguous()
        self.__cuda_array_interface__ = {
            "shape": (tensor.nbytes,),
            "typestr": "|u1",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def _borrowed(tensor: Tensor) -> Tensor:
    """Return a tensor over the same memory that does not keep the pool from giving it away."""
    place = torch.as_tensor(_Place(tensor), device=tensor.device)
    return place.view(tensor.dtype).view(tensor.shape)


class _KernelNode(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2."""

    _fields_ = (
        ("func", ctypes.c_void_p),
        ("sizes", ctypes.c_uint * 7),
        ("arguments", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("kernel", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    )


def _node_name(node: ctypes.c_void_p) -> str:
    kind = ctypes.c_int()
    _check(_driver().cuGraphNodeGetType(node, ctypes.byref(kind)))
    if kind.value != _KERNEL_NODE:
        return "copy" if kind.value == _COPY_NODE else f"node of type {kind.value}"
    found, name = _KernelNode(), ctypes.c_char_p()
    _check(_driver().cuGraphKernelNodeGetParams_v2(node, ctypes.byref(found)))
    if found.func:
        _check(_driver().cuFuncGetName(ctypes.byref(name), ctypes.c_void_p(found.func)))
    else:
        _check(_driver().cuKernelGetName(ctypes.byref(name), ctypes.c_void_p(found.kernel)))
    return plain_name((name.value or b"").decode())


@cache
def plain_name(symbol: str) -> str:
    """Return a kernel's name without types and arguments, as in "elementwise_kernel"."""
    text = _demangled(symbol).removeprefix("void ")
    for i, letter in enumerate(text):
        if letter in "<(" and not text[i:].startswith("(anonymous"):
            text = text[:i]
            break
    return text.rsplit("::", 1)[-1]


def _demangled(symbol: str) -> str:
    try:
        demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
        free = ctypes.CDLL(None).free
    except (OSError, AttributeError):
        return symbol
    demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    found = demangle(symbol.encode(), None, None, ctypes.byref(status))
    if status.value != 0 or not found:
        return symbol
    text = ctypes.string_at(found).decode()
    free(ctypes.c_void_p(found))
    return text
