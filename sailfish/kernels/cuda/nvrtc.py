"""Compiles CUDA C++ to machine code with NVRTC, which needs no GPU. No torch."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sailfish.base.errors import EngineError

SOURCE_DIR = Path(__file__).parent / "source"
_OPTIONS = ("--std=c++17", "--ptxas-options=-v", "--device-as-default-execution-space")
_SPILL = re.compile(r"(\d+) bytes spill (?:stores|loads)")
_REGISTERS = re.compile(r"Used (\d+) registers")


@dataclass(frozen=True, slots=True)
class Compiled:
    """Machine code of one source file, or PTX for an architecture named "compute_..."."""

    code: bytes
    log: str
    """What the compiler and the assembler said."""

    @property
    def spill_bytes(self) -> int:
        """The most bytes that any kernel of the file spills to local memory."""
        return max(map(int, _SPILL.findall(self.log)), default=0)

    @property
    def registers(self) -> int:
        """The most registers that a thread of any kernel of the file takes."""
        return max(map(int, _REGISTERS.findall(self.log)), default=0)


def compile_source(file: str, arch: str, defines: Mapping[str, int | str]) -> Compiled:
    """Compile `source/file` for "sm_80", "sm_90a" or "compute_80"; EngineError with the log if it fails."""
    nvrtc = _library()
    text = (SOURCE_DIR / file).read_bytes()
    options = [
        *_OPTIONS,
        f"--gpu-architecture={arch}",
        f"--include-path={SOURCE_DIR}",
        *(f"--define-macro={name}={value}" for name, value in defines.items()),
    ]
    if arch.startswith("compute_"):
        options.remove("--ptxas-options=-v")
    program = ctypes.c_void_p()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, file.encode(), 0, None, None))
    try:
        encoded = (ctypes.c_char_p * len(options))(*map(str.encode, options))
        status = nvrtc.nvrtcCompileProgram(program, len(options), encoded)
        log = _fetch(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).rstrip(b"\0").decode()
        if status != 0:
            raise EngineError(f"{file} does not compile for {arch}: {log}", hint="report this with the log")
        kind = "PTX" if arch.startswith("compute_") else "CUBIN"
        size, get = (getattr(nvrtc, f"nvrtcGet{kind}{suffix}") for suffix in ("Size", ""))
        return Compiled(_fetch(size, get, program), log)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


@cache
def compiler_version() -> str:
    """Return NVRTC's version, such as "13.0"; EngineError if there is no NVRTC."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"


def has_nvrtc() -> bool:
    """Say whether a compiler is installed."""
    try:
        _library()
    except EngineError:
        return False
    return True


@cache
def _library() -> ctypes.CDLL:
    for path in (*_installed(), *map(Path, ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"))):
        try:
            for builtins in path.parent.glob("libnvrtc-builtins.so.*") if path.is_absolute() else ():
                ctypes.CDLL(str(builtins))  # which NVRTC opens by name, whatever folder it is in itself
            return ctypes.CDLL(str(path))
        except OSError:
            continue
    raise EngineError(
        "NVRTC, the CUDA run-time compiler, is not installed",
        hint="pip install nvidia-cuda-nvrtc (a CUDA build of torch brings it)",
    )


def _installed() -> Iterator[Path]:
    """Yield the libraries of the nvidia-cuda-nvrtc package, the newest major version first."""
    for root in map(Path, sys.path):
        found = [
            *root.glob("nvidia/cu*/lib/libnvrtc.so.*"),
            *root.glob("nvidia/cuda_nvrtc/lib/libnvrtc.so.*"),
        ]
        yield from sorted(found, reverse=True)


def _fetch(size_of: ctypes._FuncPointer, get: ctypes._FuncPointer, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(get(program, buffer))
    return buffer.raw


def _check(status: int) -> None:
    if status != 0:
        describe = _library().nvrtcGetErrorString
        describe.restype = ctypes.c_char_p
        raise EngineError(f"NVRTC failed: {describe(status).decode()}")
