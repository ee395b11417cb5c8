"""Reads the memory that is really used: the process's resident set, and what CUDA has given out."""

from __future__ import annotations

import ctypes
import mmap
import resource
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaMemory:
    """Memory of one CUDA device, in bytes."""

    allocated_bytes: int
    """In live tensors of this process."""
    reserved_bytes: int
    """Held by torch's allocator in this process, live tensors included."""
    peak_allocated_bytes: int
    free_bytes: int
    total_bytes: int


def resident_bytes() -> int:
    """Return the resident set of this process (without /proc: its peak)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return pages * resource.getpagesize()


def anonymous_bytes() -> int:
    """Return the resident set without file pages, which the kernel can drop (without /proc: all of it)."""
    try:
        fields = Path("/proc/self/statm").read_text().split()
    except OSError:
        return resident_bytes()
    return (int(fields[1]) - int(fields[2])) * resource.getpagesize()


def trim_heap() -> None:
    """Give freed heap pages back to the system, so that the resident set is what is held (glibc only)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def prefer_large_pages(address: int, n_bytes: int) -> None:
    """Ask for pages of 2 MB under memory that nobody has touched yet, for streams of weights; Linux only.

    The system may decline: then pages are small, and nothing else changes.
    """
    if sys.platform == "linux":
        page = resource.getpagesize()
        start, end = -(-address // page) * page, (address + n_bytes) // page * page
        if start < end:
            advise = ctypes.CDLL(None).madvise
            advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE)


def cuda_memory(index: int = 0) -> CudaMemory:
    """Return the memory state of a CUDA device as seen by this process."""
    import torch

    free_bytes, total_bytes = torch.cuda.mem_get_info(index)
    return CudaMemory(
        allocated_bytes=torch.cuda.memory_allocated(index),
        reserved_bytes=torch.cuda.memory_reserved(index),
        peak_allocated_bytes=torch.cuda.max_memory_allocated(index),
        free_bytes=free_bytes,
        total_bytes=total_bytes,
    )


def begin_cuda_peak(index: int = 0) -> None:
    """Forget the peak so far: `peak_allocated_bytes` counts from here."""
    import torch

    torch.cuda.reset_peak_memory_stats(index)


def release_cuda() -> None:
    """Give what torch's allocator holds but does not use back to the device."""
    import torch

    torch.cuda.empty_cache()
