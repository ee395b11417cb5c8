"""Which CUDA sources are compiled for what, and which are known to spill nothing.

`python tests/cpu/cuda_cases.py` compiles what is not known yet and writes it down: minutes of every core.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import sailfish.kernels.cuda as cuda
from sailfish.kernels.cuda import nvrtc
from sailfish.kernels.cuda.nvrtc import SOURCE_DIR, Compiled, compile_source, compiler_version
from sailfish.kernels.cuda.program import ARCHITECTURES, Variant

INCLUDE = re.compile(r'#include "(\w+\.cuh)"')
ASKED = re.compile(r"__CUDA_ARCH__ *(?:>=|<) *(\d+)")
RECORD = Path(__file__).with_name("cuda_known.txt")
Group = tuple[str, str]
"""An architecture, and a source's file."""


def variants() -> list[Variant]:
    """Return every variant that a skin lists."""
    modules = [import_module(f"{cuda.__name__}.{found.name}") for found in iter_modules(cuda.__path__)]
    return [variant for module in modules for variant in getattr(module, "VARIANTS", ())]


def groups() -> dict[Group, list[Variant]]:
    """Return every variant on each architecture whose code is its own, and a source's first one on all.

    Cards that see the same text get the same program: ptxas has as many registers and as much local memory
    for each of them, so what spills on one spills on the first.
    """
    found: dict[Group, list[Variant]] = {}
    seen: dict[tuple[Variant, frozenset[int]], str] = {}
    for arch in ARCHITECTURES:
        for variant in variants():
            if variant.runs_on(arch):
                same = seen.setdefault((variant, _told_apart(variant.file, arch)), arch)
                if same == arch or (arch, variant.file) not in found:
                    found.setdefault((arch, variant.file), []).append(variant)
    return found


def digest(group: Group, of: Sequence[Variant]) -> str:
    """Return a digest of all that the machine code of a group's variants depends on."""
    arch, file = group
    told = hashlib.sha256(Path(nvrtc.__file__).read_bytes())  # which has the options
    for text in (compiler_version(), arch, *_texts(file), *map(str, of)):
        told.update(text.encode() + b"\0")
    return told.hexdigest()[:32]


def known() -> frozenset[str]:
    """Return the digests of groups that were compiled without spills."""
    return frozenset(line.split()[0] for line in RECORD.read_text().splitlines())


def compiled(case: tuple[str, Variant]) -> Compiled:
    """Compile a variant for an architecture."""
    arch, variant = case
    return compile_source(variant.file, arch, dict(variant.defines))


def write(proved: dict[Group, list[Variant]]) -> None:
    """Write down what was compiled without spills."""
    lines = [f"{digest(group, of)} {' '.join(group)} {len(of)}\n" for group, of in proved.items()]
    RECORD.write_text("".join(lines))


def main() -> None:
    """Compile every group that is not known, and write down all that spill nothing."""
    seen, proved = known(), {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for group, of in groups().items():
            cases = [] if digest(group, of) in seen else [(group[0], variant) for variant in of]
            if all(code.spill_bytes == 0 for code in pool.map(compiled, cases)):
                proved[group] = of
    write(proved)


@cache
def _texts(file: str) -> tuple[str, ...]:
    """Return the texts of a source and of all that it includes."""
    texts: dict[str, str] = {}
    todo = [file]
    while todo:
        if (name := todo.pop()) not in texts:
            texts[name] = (SOURCE_DIR / name).read_text()
            todo += INCLUDE.findall(texts[name])
    return tuple(texts.values())


def _told_apart(file: str, arch: str) -> frozenset[int]:
    """Return the versions that a source, or what it includes, asks `arch` for and finds."""
    asked = {int(version) for text in _texts(file) for version in ASKED.findall(text)}
    return frozenset(version for version in asked if version <= 10 * int(arch.strip("sm_a")))


if __name__ == "__main__":
    main()
