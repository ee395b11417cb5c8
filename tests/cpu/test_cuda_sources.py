"""Every CUDA source compiles for every architecture without a GPU, spills nothing, and fits a small card."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import import_module
from pkgutil import iter_modules

import pytest

import sailfish.kernels.cuda as cuda
from sailfish.kernels.cuda.nvrtc import SOURCE_DIR, Compiled, compile_source, has_nvrtc
from sailfish.kernels.cuda.program import ARCHITECTURES, Variant

_INCLUDE = re.compile(r'#include "(\w+\.cuh)"')
_ASKED = re.compile(r"__CUDA_ARCH__ *(?:>=|<) *(\d+)")
pytestmark = pytest.mark.skipif(not has_nvrtc(), reason="NVRTC is not installed")


def _variants() -> list[Variant]:
    modules = [import_module(f"{cuda.__name__}.{found.name}") for found in iter_modules(cuda.__path__)]
    return [variant for module in modules for variant in getattr(module, "VARIANTS", ())]


def test_every_source_has_a_variant() -> None:
    """A file that no skin names would never be compiled here."""
    assert {path.name for path in SOURCE_DIR.glob("*.cu")} == {variant.file for variant in _variants()}


def _told_apart(file: str, arch: str) -> frozenset[int]:
    """Return the versions that a source, or what it includes, asks `arch` for and finds."""
    seen, todo = set(), [file]
    while todo:
        if (name := todo.pop()) not in seen:
            seen.add(name)
            todo += _INCLUDE.findall((SOURCE_DIR / name).read_text())
    asked = {int(version) for name in seen for version in _ASKED.findall((SOURCE_DIR / name).read_text())}
    return frozenset(version for version in asked if version <= 10 * int(arch.strip("sm_a")))


def _cases() -> list[tuple[str, Variant]]:
    """Return every variant on each architecture whose code is its own, and a source's first one on all.

    Cards that see the same text get the same program: ptxas has as many registers and as much local memory
    for each of them, so what spills on one spills on the first.
    """
    found = []
    seen: dict[tuple[Variant, frozenset[int]], str] = {}
    for arch in ARCHITECTURES:
        files = set()
        for variant in _variants():
            if variant.runs_on(arch):
                same = seen.setdefault((variant, _told_apart(variant.file, arch)), arch)
                if same == arch or variant.file not in files:
                    found.append((arch, variant))
                files.add(variant.file)
    return found


CASES = _cases()
Compiling = dict[tuple[str, Variant], Future[Compiled]]


@pytest.fixture(scope="module")
def compiling(request: pytest.FixtureRequest) -> Iterator[Compiling]:
    """Begin to compile all that was asked for, on every core: NVRTC runs without Python's lock."""
    asked = [item.callspec.params.get("case") for item in request.session.items if hasattr(item, "callspec")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            (arch, variant): pool.submit(compile_source, variant.file, arch, dict(variant.defines))
            for arch, variant in CASES
            if (arch, variant) in asked
        }
        pool.shutdown(cancel_futures=True)


def test_sources_ask_for_versions_in_one_way_only() -> None:
    """`_told_apart` reads nothing else."""
    for path in [*SOURCE_DIR.glob("*.cu"), *SOURCE_DIR.glob("*.cuh")]:
        text = path.read_text()
        assert text.count("__CUDA_ARCH") == len(_ASKED.findall(text)), path.name
        assert text.count("#include") == len(_INCLUDE.findall(text)), path.name


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} {case[1]}")
def test_a_source_compiles_without_spills(case: tuple[str, Variant], compiling: Compiling) -> None:
    """Local memory in an inner loop costs more than any trick around it saves."""
    assert compiling[case].result().spill_bytes == 0


LET_NEXT, WAIT = "griddepcontrol.launch_dependents", "griddepcontrol.wait"
IN_TURN = {"build_inputs"}
"""Kernels that are never launched early, and so need not wait."""


def _entries(file: str) -> dict[str, str]:
    """Return the PTX of each kernel of a file's first variant, by name."""
    variant = next(variant for variant in _variants() if variant.file == file)
    text = compile_source(file, "compute_90a", dict(variant.defines)).code.decode()
    return dict(entry.split("(", 1) for entry in text.split(".entry ")[1:])


@pytest.mark.parametrize("file", sorted(path.name for path in SOURCE_DIR.glob("*.cu")))
def test_who_lets_the_next_begin_waits_too(file: str) -> None:
    """Else the next one's wait, which is for us alone, would not cover what is ahead of us."""
    entries = _entries(file)
    assert entries
    assert {name for name, text in entries.items() if LET_NEXT in text and WAIT not in text} <= IN_TURN


def test_nobody_behind_the_embedding_begins_before_the_tables_are_written() -> None:
    """Decode attention reads them before its own wait, and kernels between let the next begin at once."""
    entries = _entries("embed.cu")
    for name in ("embed", "embed_int8"):
        assert 0 <= entries[name].find(WAIT) < entries[name].find(LET_NEXT), name


def test_code_that_cannot_wait_is_for_the_cards_before_hopper() -> None:
    variant = next(variant for variant in _variants() if variant.file == "embed.cu")
    assert b"griddepcontrol" not in compile_source("embed.cu", "compute_80", dict(variant.defines)).code
