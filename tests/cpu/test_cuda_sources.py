"""Every CUDA source compiles for every architecture without a GPU, spills nothing, and fits a small card."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

import pytest

import sailfish.kernels.cuda as cuda
from sailfish.kernels.cuda.nvrtc import SOURCE_DIR, compile_source, has_nvrtc
from sailfish.kernels.cuda.program import ARCHITECTURES, Variant

pytestmark = pytest.mark.skipif(not has_nvrtc(), reason="NVRTC is not installed")


def _variants() -> list[Variant]:
    modules = [import_module(f"{cuda.__name__}.{found.name}") for found in iter_modules(cuda.__path__)]
    return [variant for module in modules for variant in getattr(module, "VARIANTS", ())]


def test_every_source_has_a_variant() -> None:
    """A file that no skin names would never be compiled here."""
    assert {path.name for path in SOURCE_DIR.glob("*.cu")} == {variant.file for variant in _variants()}


@pytest.mark.parametrize("variant", _variants(), ids=str)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_source_compiles_without_spills(variant: Variant, arch: str) -> None:
    """Local memory in an inner loop costs more than any trick around it saves."""
    if not variant.runs_on(arch):
        pytest.skip(f"made for {variant.only}")
    assert compile_source(variant.file, arch, dict(variant.defines)).spill_bytes == 0
