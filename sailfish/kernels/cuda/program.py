"""Finds a kernel's machine code for the card that is there: shipped, cached, or compiled now."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from sailfish.base.sources import cache_dir
from sailfish.kernels.cuda.driver import Kernel, Library
from sailfish.kernels.cuda.nvrtc import SOURCE_DIR, compile_source, compiler_version

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a")
"""What every source compiles for; a newer card runs the PTX of the first."""
Defines = tuple[tuple[str, int | str], ...]


@dataclass(frozen=True, slots=True)
class Variant:
    """One way a source is compiled. Each skin lists its own in VARIANTS, which the suite compiles."""

    file: str
    defines: Defines = ()
    only: tuple[str, ...] = ARCHITECTURES
    """Architectures it is made for."""

    def runs_on(self, arch: str) -> bool:
        """Say whether it is made for `arch`."""
        return arch in self.only

    def __str__(self) -> str:
        return " ".join((self.file, *(f"{name}={value}" for name, value in self.defines)))


@cache
def kernel(file: str, name: str, defines: Defines = ()) -> Kernel:
    """Return kernel `name` of `source/file` for the current device, compiled with `defines`."""
    arch = architecture()
    return Kernel(_library(file, arch, defines), name, name, can_wait=arch == "sm_90a")


@cache
def architecture() -> str:
    """Return what to compile for on the current device."""
    major, minor = torch.cuda.get_device_capability()
    if major == 9:
        return "sm_90a"
    exact = f"sm_{major}{minor}"
    return exact if exact in ARCHITECTURES else "compute_80"


def stream() -> int:
    """Return the handle of torch's current stream."""
    return torch.cuda.current_stream().cuda_stream


@cache
def n_processors() -> int:
    """Return the number of multiprocessors of the current device."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


@cache
def _library(file: str, arch: str, defines: Defines) -> Library:
    return Library(machine_code(file, arch, dict(defines)))


def machine_code(file: str, arch: str, defines: Mapping[str, int | str]) -> bytes:
    """Return the cubin (PTX for "compute_..."), from the cache by (source, arch, compiler) if it is there."""
    directory = cache_dir() / "kernels"
    path = directory / f"{Path(file).stem}-{_key(file, arch, defines)}.bin"
    try:
        return path.read_bytes()
    except OSError:
        code = compile_source(file, arch, defines).code
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, delete=False) as part:
            part.write(code)
        os.replace(part.name, path)
    except OSError:
        pass  # a read-only cache costs a compilation at the next start, nothing else
    return code


def _key(file: str, arch: str, defines: Mapping[str, int | str]) -> str:
    digest = hashlib.sha256(f"{arch} {sorted(defines.items())} {compiler_version()}".encode())
    for source in (SOURCE_DIR / file, *sorted(SOURCE_DIR.glob("*.cuh"))):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:24]
