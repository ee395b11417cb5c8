"""Looks at this machine: its CPU or its first visible NVIDIA GPU, as a HardwareProfile."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sailfish.base.errors import ConfigError
from sailfish.hardware.profile import (
    CPU_RUNTIME_BYTES,
    CUDA_RUNTIME_BYTES,
    MIB,
    PROFILES,
    HardwareProfile,
)

_X86_FEATURES = {
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "avx512f": "avx512",
    "avx512_vnni": "avx512_vnni",
    "avx_vnni": "avx_vnni",
    "avx512_bf16": "avx512_bf16",
    "amx_tile": "amx",
    "amx_bf16": "amx_bf16",
    "amx_int8": "amx_int8",
}
_ARM_FEATURES = {"asimd": "neon", "asimddp": "dotprod", "bf16": "bf16", "i8mm": "i8mm", "sve": "sve"}
_SMI_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One NVIDIA GPU as the driver reports it."""

    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int
    free_bytes: int
    driver: str


def probe(device: str | None = None, *, environ: Mapping[str, str] | None = None) -> HardwareProfile:
    """Return the profile of this machine's device; None takes a GPU when one is visible, else the CPU.

    Needs no torch: the CPU is read from the operating system, a GPU through nvidia-smi.
    `environ` gives CUDA_VISIBLE_DEVICES. Raises ConfigError when the device is not here.
    """
    if device == "cpu":
        return probe_cpu()
    if device not in (None, "cuda"):
        raise ConfigError(f"device {device!r} is unknown", hint='use "cpu" or "cuda"')
    gpu, why_not = find_gpu(environ or {})
    if gpu is not None:
        return profile_of_gpu(gpu)
    if device == "cuda":
        raise ConfigError(
            f"no CUDA device is usable here: {why_not}", hint="use --device cpu, or fix the driver"
        )
    return probe_cpu()


def probe_cpu(root: Path = Path("/")) -> HardwareProfile:
    """Return the profile of this machine's CPU, within its container's limits.

    `root` stands before /proc and /sys, for tests.
    """
    meminfo = _meminfo(root)
    total_bytes = meminfo.get("MemTotal") or _physical_bytes()
    free_bytes = meminfo.get("MemAvailable") or total_bytes // 2
    for limit_bytes, used_bytes in cgroup_memory(root):
        total_bytes = min(total_bytes, limit_bytes)
        free_bytes = min(free_bytes, max(0, limit_bytes - used_bytes))
    name, features = _cpu_model(root)
    return HardwareProfile(
        target="cpu",
        device="cpu",
        name=name,
        memory_bytes=total_bytes,
        free_bytes=free_bytes,
        n_cores=cpu_cores(root),
        features=features,
        runtime_bytes=CPU_RUNTIME_BYTES,
        is_here=True,
    )


def profile_of_gpu(gpu: Gpu) -> HardwareProfile:
    """Return the profile of a present GPU, with data-sheet rates where the table has its name."""
    rows = [row for row in PROFILES if row.name.lower() in gpu.name.lower()]
    major, minor = gpu.compute_capability
    return HardwareProfile(
        target=f"sm_{major}{minor}",
        device="cuda",
        name=gpu.name,
        memory_bytes=gpu.memory_bytes,
        free_bytes=gpu.free_bytes,
        n_cores=rows[0].n_cores if rows else 0,
        bandwidth_bytes_per_s=rows[0].bandwidth_bytes_per_s if rows else None,
        bf16_flops_per_s=rows[0].bf16_flops_per_s if rows else None,
        runtime_bytes=CUDA_RUNTIME_BYTES,
        is_here=True,
    )


def find_gpu(environ: Mapping[str, str]) -> tuple[Gpu | None, str]:
    """Return the first GPU that CUDA_VISIBLE_DEVICES leaves visible, or None and the reason."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    chosen = (visible.split(",")[0].strip() or "-1") if visible is not None else "0"
    if chosen == "-1":
        return None, "CUDA_VISIBLE_DEVICES hides every GPU"
    smi = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if smi is None:
        return None, "nvidia-smi is not on the PATH, so no NVIDIA driver is installed"
    query = "name,compute_cap,memory.total,memory.free,driver_version"
    command = [smi, f"--query-gpu={query}", "--format=csv,noheader,nounits", f"--id={chosen}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"nvidia-smi did not run: {error}"
    if done.returncode != 0:
        words = (done.stdout + done.stderr).strip().splitlines()
        return None, f"nvidia-smi says: {words[0] if words else f'exit code {done.returncode}'}"
    return _parse_smi(done.stdout)


def cpu_cores(root: Path = Path("/")) -> int:
    """Return the cores this process may use: its affinity, capped by the cgroup's quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    n_cores = len(affinity(0)) if affinity is not None else (os.cpu_count() or 1)
    for group in _cgroup_dirs(root):
        quota, _, period = _read(group / "cpu.max").partition(" ")
        if quota.isdigit() and period.strip().isdigit() and int(period) > 0:
            n_cores = min(n_cores, max(1, -(-int(quota) // int(period))))
    return n_cores


def cgroup_memory(root: Path = Path("/")) -> list[tuple[int, int]]:
    """Return (limit, used) in bytes of each memory limit above this process, cgroup v2 and v1.

    Page cache that the kernel can drop is not counted as used.
    """
    found = []
    for group in _cgroup_dirs(root):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = _read(group / limit_name), _read(group / used_name)
            if limit.isdigit() and used.isdigit() and int(limit) < 2**60:
                found.append((int(limit), max(0, int(used) - _reclaimable_bytes(group))))
    return found


def _cgroup_dirs(root: Path) -> list[Path]:
    """List this process's control groups, innermost first, up to the mounts."""
    found: list[Path] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers not in ("", "memory"):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        inner = mount / path.lstrip("/")
        found += [group for group in (inner, *inner.parents) if group == mount or mount in group.parents]
    return found


def _reclaimable_bytes(group: Path) -> int:
    fields = dict(line.split()[:2] for line in _read(group / "memory.stat").splitlines() if " " in line)
    value = fields.get("inactive_file", fields.get("total_inactive_file", "0"))
    return int(value) if value.isdigit() else 0


def _meminfo(root: Path) -> dict[str, int]:
    fields = {}
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            fields[name] = int(words[0]) * 1024
    return fields


def _physical_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cpu_model(root: Path) -> tuple[str, tuple[str, ...]]:
    name, words = "", set()
    for line in _read(root / "proc/cpuinfo").split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() == "model name":
            name = value.strip()
        elif key.strip().lower() in ("flags", "features"):
            words = set(value.split())
    machine = platform.machine()
    table = _ARM_FEATURES if machine in ("aarch64", "arm64") else _X86_FEATURES
    if not words and table is _ARM_FEATURES:
        words = {"asimd"}  # every 64-bit Arm core has it; macOS has no /proc to say so
    return name or machine, tuple(sorted(table[word] for word in words & table.keys()))


def _parse_smi(text: str) -> tuple[Gpu | None, str]:
    fields = [field.strip() for field in text.splitlines()[0].split(",")] if text.strip() else []
    try:
        name, capability, total_mib, free_mib, driver = fields
        major, minor = capability.split(".")
        return Gpu(
            name=name,
            compute_capability=(int(major), int(minor)),
            memory_bytes=int(total_mib) * MIB,
            free_bytes=int(free_mib) * MIB,
            driver=driver,
        ), ""
    except ValueError:
        return None, f"nvidia-smi answered {text.strip()[:200]!r}"


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
