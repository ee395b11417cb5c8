"""What a device is, in numbers: of this machine (probed), or of a target that is not here (a row)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from sailfish.base.errors import ConfigError

GIB = 1024**3
MIB = 1024**2


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareProfile:
    """One device that an engine can run on."""

    target: str
    """"cpu" or a CUDA architecture such as "sm_90"."""
    device: Literal["cpu", "cuda"]
    name: str
    memory_bytes: int
    """All memory of the device (CPU: of the machine, or its container's limit)."""
    free_bytes: int
    """What an engine may take, counted before it takes anything."""
    n_cores: int
    """CPU: cores this process may use. CUDA: streaming multiprocessors (0: unknown)."""
    features: tuple[str, ...] = ()
    """CPU: instruction sets such as "avx512_bf16"."""
    bandwidth_bytes_per_s: float | None = None
    """Memory read rate, from the data sheet."""
    bf16_flops_per_s: float | None = None
    """Dense bfloat16 peak, from the data sheet."""
    runtime_bytes: int
    """Memory of a process before weights: CUDA context and libraries, or interpreter and torch."""
    is_here: bool = False
    """True when probed on this machine rather than taken from the table."""

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        """(major, minor) of a CUDA architecture, None for the CPU."""
        match = re.fullmatch(r"sm_(\d+)(\d)", self.target)
        return (int(match[1]), int(match[2])) if match else None

    @property
    def key(self) -> str:
        """A file-name-safe name of this kind of device, e.g. "sm_90-nvidia-h200"."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[:48]
        return f"{self.target}-{slug}" if slug else self.target


CPU_RUNTIME_BYTES = 146 * MIB
"""Resident set of the engine process before weights, without file pages: Python and torch's CPU build.

Measured with torch 2.13: 146 MiB."""
CUDA_RUNTIME_BYTES = 685 * MIB
"""Driver-side memory of a process with torch, cuBLAS and one stream, outside torch's allocator."""


def _gpu(
    target: str, name: str, memory_bytes: int, n_sm: int, bytes_per_s: float, flops_per_s: float
) -> HardwareProfile:
    return HardwareProfile(
        target=target,
        device="cuda",
        name=name,
        memory_bytes=memory_bytes,
        free_bytes=memory_bytes - 512 * MIB,  # the driver's own share of an idle card
        n_cores=n_sm,
        bandwidth_bytes_per_s=bytes_per_s,
        bf16_flops_per_s=flops_per_s,
        runtime_bytes=CUDA_RUNTIME_BYTES,
    )


PROFILES: tuple[HardwareProfile, ...] = (
    HardwareProfile(
        target="cpu",
        device="cpu",
        name="generic x86-64",
        memory_bytes=16 * GIB,
        free_bytes=12 * GIB,
        n_cores=4,
        features=("avx2", "f16c", "fma"),
        bandwidth_bytes_per_s=40e9,
        runtime_bytes=CPU_RUNTIME_BYTES,
    ),
    _gpu("sm_80", "NVIDIA A100 80GB", 81_920 * MIB, 108, 2.039e12, 312e12),
    _gpu("sm_86", "NVIDIA GeForce RTX 3090", 24_576 * MIB, 82, 0.936e12, 71e12),
    _gpu("sm_89", "NVIDIA GeForce RTX 4090", 24_564 * MIB, 128, 1.008e12, 165e12),
    _gpu("sm_89", "NVIDIA L40S", 46_068 * MIB, 142, 0.864e12, 362e12),
    _gpu("sm_90", "NVIDIA H100 80GB", 81_559 * MIB, 132, 3.35e12, 989e12),
    _gpu("sm_90", "NVIDIA H200", 143_771 * MIB, 132, 4.8e12, 989e12),
)
"""Data-sheet rows. The first row of a target stands for it: its smallest common card."""

TARGETS = tuple(dict.fromkeys(row.target for row in PROFILES))


def profile(name: str) -> HardwareProfile:
    """Return the row of a target ("sm_90") or of a card ("h200", "RTX 4090", "NVIDIA A100 80GB").

    Raises ConfigError naming what exists.
    """
    wanted = _card(name)
    for row in PROFILES:
        if wanted == row.target:
            return row
    for row in PROFILES:
        if row.device == "cuda" and wanted in (_card(row.name), *_models(row)):
            return row
    cards = ", ".join(row.name.removeprefix("NVIDIA ") for row in PROFILES if row.device == "cuda")
    raise ConfigError(
        f"no hardware profile is called {name!r}", hint=f"use {', '.join(TARGETS)}, or one of: {cards}"
    )


def _card(name: str) -> str:
    """Return a card's name as it is compared, such as "a100 80gb" or "rtx 4090"."""
    return " ".join(name.casefold().split()).removeprefix("nvidia ").removeprefix("geforce ")


def _models(row: HardwareProfile) -> list[str]:
    """Return the words of a card's name that single it out, such as "a100" or "4090"."""
    words = _card(row.name).split()
    return [word for word in words if any(map(str.isdigit, word)) and not word.endswith("gb")]
