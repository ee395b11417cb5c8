"""Whether the kernels that an engine's choices name were really launched."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path

from sailfish.kernels.choose import find
from sailfish.kernels.contract import Choice
from sailfish.kernels.fused_table import COMPOSED

_OURS = "sailfish.kernels.cuda"
_SOURCE = re.compile(r'"(\w+\.cu)"')
_FAMILY = re.compile("stream|wide")
"""In the names of implementations that multiply by a weight, and of their kernels."""
_VARIANT = re.compile(r"_\d+$")
"""What a macro puts behind the name of a kernel that is compiled in several ways."""


def is_of(kernel: str, entry: str) -> bool:
    """Say whether a launched kernel is one of the sources behind an implementation's `module:function`."""
    names = {kernel, _VARIANT.sub("", kernel)}
    return any(re.search(rf"\b{re.escape(name)}\b", text) for text in _sources(entry) for name in names)


def has_kernels(entry: str) -> bool:
    """Say whether an implementation is made of this package's kernels, rather than of torch's products."""
    return bool(_sources(entry)) and "_mm" not in entry.split(":")[1]


def chosen_for(choices: Iterable[Choice], n_rows: int) -> list[Choice]:
    """Return what does each op in a step of so many rows; not one that fused products leave no work."""
    found: dict[tuple[str, int, int, str], Choice] = {}
    for choice in choices:
        key = choice.op, choice.n_out, choice.n_in, choice.activation
        if choice.max_rows is None or n_rows <= choice.max_rows:
            found.setdefault(key, choice)
    activated = [choice for choice in found.values() if choice.activation]
    if activated and not any(choice.implementation == COMPOSED for choice in activated):
        found.pop(("act_mul", 0, 0, ""), None)
    return list(found.values())


def unlaunched(choices: Iterable[Choice], launches: Mapping[str, int]) -> list[str]:
    """Return "op by implementation" of each choice that has kernels of its own and launched none of them."""
    missing = set()
    for choice in choices:
        entry = find(choice.op, choice.implementation).entry
        kernels = list(launches)
        if "linear" in choice.op and (family := _FAMILY.search(choice.implementation)):
            # What quantises its input, or the module of another family that it calls, does not count.
            kernels = [name for name in launches if family[0] in name]
            kernels = [name for name in kernels if ("int4" in name) == ("int4" in choice.op)]
        if has_kernels(entry) and not any(is_of(kernel, entry) for kernel in kernels):
            missing.add(f"{choice.op} by {choice.implementation}")
    return sorted(missing)


def _sources(entry: str) -> list[str]:
    """Return the texts of the CUDA sources that an implementation's module, or one it calls, compiles."""
    name = entry.split(":")[0]
    if not name.startswith(f"{_OURS}."):
        return []
    module = import_module(name)
    called = {getattr(value, "__module__", None) for value in vars(module).values()}
    owners = [module, *(sys.modules[other] for other in called if other and other.startswith(f"{_OURS}."))]
    texts = [Path(str(owner.__file__)).read_text(encoding="utf-8") for owner in owners]
    files = {file for text in texts for file in _SOURCE.findall(text)}
    source_dir = import_module(f"{_OURS}.nvrtc").SOURCE_DIR
    return [(source_dir / file).read_text(encoding="utf-8") for file in sorted(files)]
