"""Whether the kernels that an engine's choices name were really launched."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib import import_module
from types import ModuleType

from sailfish.kernels.choose import find
from sailfish.kernels.contract import Choice

_OURS = "sailfish.kernels.cuda"
_KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^;{]*?\)\s+)?(\w+)\s*\(")


def kernels_of(entry: str) -> set[str]:
    """Return the names of the CUDA kernels behind an implementation's `module:function`; torch has none."""
    name = entry.split(":")[0]
    if not name.startswith(f"{_OURS}."):
        return set()
    module = import_module(name)
    parts = [value for value in vars(module).values() if isinstance(value, ModuleType)]
    owners = [module, *(part for part in parts if part.__name__.startswith(f"{_OURS}."))]
    files = {variant.file for owner in owners for variant in getattr(owner, "VARIANTS", ())}
    source_dir = import_module(f"{_OURS}.nvrtc").SOURCE_DIR
    return {kernel for file in files for kernel in _KERNEL.findall((source_dir / file).read_text())}


def chosen_for(choices: Iterable[Choice], n_rows: int) -> list[Choice]:
    """Return what does each op in a step of so many rows."""
    found: dict[tuple[str, int, int], Choice] = {}
    for choice in choices:
        key = choice.op, choice.n_out, choice.n_in
        if choice.max_rows is None or n_rows <= choice.max_rows:
            found.setdefault(key, choice)
    return list(found.values())


def unlaunched(choices: Iterable[Choice], launches: Mapping[str, int]) -> list[str]:
    """Return "op by implementation" of each choice that has kernels of its own and launched none of them."""
    missing = set()
    for choice in choices:
        kernels = kernels_of(find(choice.op, choice.implementation).entry)
        if "int4" in choice.op:
            kernels = {kernel for kernel in kernels if "int4" in kernel}
        if kernels and not kernels & launches.keys():
            missing.add(f"{choice.op} by {choice.implementation}")
    return sorted(missing)
