"""The CPU's kernels as Python calls them: the best level of this CPU, through ctypes. No torch."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import MappingProxyType

from sailfish.base.errors import EngineError
from sailfish.base.sources import environment
from sailfish.hardware.doctor import Check
from sailfish.hardware.probe import cpu_cores, probe_cpu
from sailfish.kernels.cpu import compiler

_NEEDS = {
    "avx512_bf16": {"avx512_vnni", "avx512_bf16"},
    "avx512_vnni": {"avx512_vnni"},
    "avx_vnni": {"avx_vnni"},
    "avx2": set[str](),
}
"""What a CPU must have for each level, as the probe calls it, beside AVX2, FMA and F16C."""
ACTIVATIONS = MappingProxyType({None: 0, "silu": 1, "gelu_tanh": 2})
"""What the library calls an activation behind a product."""
_TYPES: dict[str, type[ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float]] = {
    "p": ctypes.c_void_p,
    "i": ctypes.c_int64,
    "f": ctypes.c_float,
}


@cache
def levels() -> tuple[str, ...]:
    """Return the levels that this CPU has and the compiler knows, the best first."""
    features = set(probe_cpu().features)
    if not features >= {"avx2", "fma", "f16c"}:
        return ()
    return tuple(level for level in compiler.LEVELS if features >= _NEEDS[level] and compiler.takes(level))


@cache
def unavailable() -> str | None:
    """Return why this machine cannot have the library, or None. Compiles nothing."""
    if reason := compiler.missing():
        return reason
    return None if levels() else "this CPU, or the C++ compiler, lacks AVX2, FMA or F16C"


def check() -> Check:
    """Return the doctor's word on the library. Compiles nothing."""
    reason = unavailable()
    if reason is None:
        by = " ".join(compiler.find_compiler() or ())
        value = f"{levels()[0]}, {usable_threads()} threads, by {by} at first use"
        return Check(name="cpu kernels", verdict="ok", value=value)
    fix = (
        "install g++ or clang++ on an x86-64 machine with AVX2; without, the CPU runs torch's slower products"
    )
    return Check(name="cpu kernels", verdict="warn", value=reason, fix=fix)


def load(level: str | None = None) -> ctypes.CDLL:
    """Load the library for a level, by default this CPU's best; EngineError where there is none.

    The first time on a machine it is compiled, which takes seconds. Its threads are as many as
    `usable_threads` says until `set_threads` changes it.
    """
    if reason := unavailable():
        raise EngineError(f"the CPU's kernels are not there: {reason}")
    return _load(level or levels()[0])


@cache
def _load(level: str) -> ctypes.CDLL:
    path = compiler.compiled(level)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise EngineError(
            f"the CPU's kernels do not load: {error}",
            hint=f"remove {path}, and see that CXX names a compiler",
        ) from error
    library.sf_set_threads.argtypes = [ctypes.c_int64]
    library.sf_set_threads(usable_threads())
    return library


@cache
def function(name: str, signature: str, level: str | None = None) -> Callable[..., None]:
    """Return a kernel of the library; while it runs, other Python threads do.

    `signature` has a letter for each argument: p a pointer, i an int64, f a float.
    """
    found = load(level)[name]
    found.argtypes = [_TYPES[letter] for letter in signature]
    found.restype = None
    return found


def set_threads(n_threads: int) -> None:
    """Have kernels called from now on run on so many threads, the caller's among them."""
    load().sf_set_threads(n_threads)


@cache
def usable_threads(root: Path = Path("/")) -> int:
    """Return the physical cores this process may use: a second thread of a core only takes its caches.

    No more than OMP_NUM_THREADS, where that is set: torch's threads obey it, so do these.
    """
    asked = environment().get("OMP_NUM_THREADS", "").split(",")[0].strip()
    most = int(asked) if asked.isdecimal() and int(asked) > 0 else cpu_cores(root)
    affinity = getattr(os, "sched_getaffinity", None)
    if affinity is None:
        return most
    cores = set()
    for cpu in affinity(0):
        path = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        try:
            cores.add(path.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return min(len(cores), cpu_cores(root), most)
