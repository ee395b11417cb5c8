"""Every CUDA source compiles for every architecture without a GPU, spills nothing, and fits a small card."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from cuda_cases import ASKED, INCLUDE, compiled, digest, groups, known, variants

from sailfish.kernels.cuda.nvrtc import SOURCE_DIR, Compiled, compile_source, has_nvrtc
from sailfish.kernels.cuda.program import Variant

pytestmark = pytest.mark.skipif(not has_nvrtc(), reason="NVRTC is not installed")


def _cases() -> list[tuple[str, Variant]]:
    """Return all that is not known to spill nothing, and of each source that is known one variant."""
    if not has_nvrtc():
        return []
    every, seen, found = groups(), known(), []
    newest = {file: arch for arch, file in every}
    for (arch, file), of in every.items():
        if digest((arch, file), of) in seen:
            of = of[: newest[file] == arch]
        found += [(arch, variant) for variant in of]
    return found


def test_every_source_has_a_variant() -> None:
    """A file that no skin names would never be compiled here."""
    assert {path.name for path in SOURCE_DIR.glob("*.cu")} == {variant.file for variant in variants()}


CASES = _cases()
Compiling = dict[tuple[str, Variant], Future[Compiled]]


@pytest.fixture(scope="module")
def compiling(request: pytest.FixtureRequest) -> Iterator[Compiling]:
    """Begin to compile all that was asked for, on every core: NVRTC runs without Python's lock."""
    asked = [item.callspec.params.get("case") for item in request.session.items if hasattr(item, "callspec")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {case: pool.submit(compiled, case) for case in CASES if case in asked}
        pool.shutdown(cancel_futures=True)


def test_sources_ask_for_versions_in_one_way_only() -> None:
    """`groups` reads nothing else."""
    for path in [*SOURCE_DIR.glob("*.cu"), *SOURCE_DIR.glob("*.cuh")]:
        text = path.read_text()
        assert text.count("__CUDA_ARCH") == len(ASKED.findall(text)), path.name
        assert text.count("#include") == len(INCLUDE.findall(text)), path.name


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} {case[1]}")
def test_a_source_compiles_without_spills(case: tuple[str, Variant], compiling: Compiling) -> None:
    """Local memory in an inner loop costs more than any trick around it saves."""
    assert compiling[case].result().spill_bytes == 0


LET_NEXT, WAIT = "griddepcontrol.launch_dependents", "griddepcontrol.wait"
IN_TURN = {"build_inputs"}
"""Kernels that are never launched early, and so need not wait."""


def _entries(file: str) -> dict[str, str]:
    """Return the PTX of each kernel of a file's first variant, by name."""
    variant = next(variant for variant in variants() if variant.file == file)
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
    variant = next(variant for variant in variants() if variant.file == "embed.cu")
    assert b"griddepcontrol" not in compile_source("embed.cu", "compute_80", dict(variant.defines)).code
