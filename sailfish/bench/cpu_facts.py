"""What a CPU figure depends on beside the engine: cores, instructions, caches, threads and load."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from sailfish.base.units import format_bytes
from sailfish.hardware.profile import HardwareProfile
from sailfish.kernels.cpu import library


def facts(hardware: HardwareProfile, environ: Mapping[str, str], root: Path = Path("/")) -> dict[str, str]:
    """Return what there is, in words; `root` stands before /proc and /sys, for tests."""
    why_not = library.unavailable()
    kernels = f"compiled here for {library.levels()[0]}" if why_not is None else f"none of ours: {why_not}"
    return {
        "CPU": hardware.name,
        "cores": f"{hardware.n_cores} that this process may use",
        "threads": _threads(hardware, environ),
        "instructions": " ".join(hardware.features),
        "caches": _caches(root) or "unknown",
        "memory": f"{format_bytes(hardware.memory_bytes)}, {format_bytes(hardware.free_bytes)} free",
        "kernels": kernels,
    }


def load() -> float:
    """Return how many processes ran or waited for a core in the last minute."""
    return round(os.getloadavg()[0], 2)


def _threads(hardware: HardwareProfile, environ: Mapping[str, str]) -> str:
    torch = environ.get("OMP_NUM_THREADS")
    of_torch = f"{hardware.n_cores}" if torch is None else f"{torch} (OMP_NUM_THREADS)"
    return f"{library.usable_threads()} of our kernels, {of_torch} of torch"


def _caches(root: Path) -> str:
    """Return the caches that the first core sees, the smallest first."""
    found = {}
    for index in sorted((root / "sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            found[f"L{level}"] = re.sub(r"^(\d+)K$", lambda match: format_bytes(int(match[1]) << 10), size)
    return ", ".join(f"{level} {size}" for level, size in sorted(found.items()))
