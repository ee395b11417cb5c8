"""Checks that this machine can run Sailfish: each with a verdict, what was found, and the exact fix."""

from __future__ import annotations

import errno
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sailfish.base.units import format_bytes
from sailfish.hardware.probe import Gpu, find_gpu, probe_cpu
from sailfish.hardware.profile import GIB, MIB

Verdict = Literal["ok", "warn", "fail"]

_MIN_PYTHON = (3, 11)
_MAX_TESTED_PYTHON = (3, 13)
_MIN_TORCH = (2, 11)
_MIN_OPEN_FILES = 4096
_MIN_SHM_BYTES = 64 * MIB
_LOW_MEMORY_BYTES = 2 * GIB
_LOW_DISK_BYTES = 2 * GIB
_TORCH_TIMEOUT_S = 120.0
_TORCH_SCRIPT = """
import json, torch
found = {"version": torch.__version__, "threads": torch.get_num_threads(), "cuda_build": torch.version.cuda}
found["capability"] = torch.backends.cpu.get_cpu_capability()
found["cuda"] = torch.cuda.is_available()
if found["cuda"]:
    found["bf16"] = torch.cuda.is_bf16_supported()
    found["device"] = torch.cuda.get_device_name(0)
try:
    import triton
    found["triton"] = triton.__version__
except ImportError:
    found["triton"] = None
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    verdict: Verdict
    value: str
    """What was found."""
    fix: str = ""
    """What to do; empty when the verdict is ok."""


def diagnose(environ: Mapping[str, str], *, cache_dir: Path, port: int = 8000) -> list[Check]:
    """Run every check; none of them raises. torch is asked in a process of its own."""
    gpu, why_no_gpu = find_gpu(environ)
    torch_facts = _ask_torch(environ)
    checks = [_python(), _platform(), *_cpu(), _memory()]
    checks += [
        _torch(torch_facts),
        _gpu(gpu, why_no_gpu, torch_facts),
        _triton(gpu is not None, torch_facts),
    ]
    checks += [_shared_memory(Path("/dev/shm")), _open_files(), _writable("engine cache", cache_dir)]
    checks += [_hub_cache(environ), _offline(environ), _loopback(port), _unix_socket()]
    return checks


def is_healthy(checks: list[Check]) -> bool:
    """Say whether no check failed; warnings are no failures."""
    return all(check.verdict != "fail" for check in checks)


def as_data(checks: list[Check]) -> dict[str, Any]:
    """Return the checks as JSON-able data."""
    return {"healthy": is_healthy(checks), "checks": [asdict(check) for check in checks]}


def _python() -> Check:
    found = sys.version_info[:2]
    value = f"{platform.python_version()} at {sys.executable}"
    if found < _MIN_PYTHON:
        return Check(name="python", verdict="fail", value=value, fix="install Python 3.11 or newer")
    if found > _MAX_TESTED_PYTHON:
        return Check(
            name="python", verdict="warn", value=value, fix="Python 3.11 to 3.13 are tested; use one of them"
        )
    return Check(name="python", verdict="ok", value=value)


def _platform() -> Check:
    value = f"{platform.system()} {platform.release()} {platform.machine()}"
    if platform.system() in ("Linux", "Darwin"):
        return Check(name="platform", verdict="ok", value=value)
    return Check(name="platform", verdict="fail", value=value, fix="use Linux or macOS; on Windows use WSL 2")


def _cpu() -> list[Check]:
    profile = probe_cpu()
    value = f"{profile.name}: {', '.join(profile.features) or 'no vector features found'}"
    is_fast = any(feature in profile.features for feature in ("avx2", "neon"))
    fix = "" if is_fast else "use a CPU with AVX2 or NEON; this one is several times slower"
    cores = Check(name="cores", verdict="ok", value=f"{profile.n_cores} usable")
    if profile.n_cores < 2:
        cores = Check(
            name="cores",
            verdict="warn",
            value="1 usable",
            fix="give the process or its container 2 or more cores",
        )
    return [Check(name="cpu", verdict="ok" if is_fast else "warn", value=value, fix=fix), cores]


def _memory() -> Check:
    profile = probe_cpu()
    value = f"{format_bytes(profile.free_bytes)} free of {format_bytes(profile.memory_bytes)}"
    if profile.free_bytes >= _LOW_MEMORY_BYTES:
        return Check(name="memory", verdict="ok", value=value)
    return Check(
        name="memory", verdict="warn", value=value, fix="end other programs, or raise the container's limit"
    )


def _ask_torch(environ: Mapping[str, str]) -> dict[str, Any] | str:
    """Return torch's own facts, or the reason there are none."""
    command = [sys.executable, "-c", _TORCH_SCRIPT]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TORCH_TIMEOUT_S, env=dict(environ)
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"python did not run: {error}"
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]
    facts: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return facts


def _torch(facts: dict[str, Any] | str) -> Check:
    fix = f"{sys.executable} -m pip install 'torch>={_MIN_TORCH[0]}.{_MIN_TORCH[1]}'"
    if isinstance(facts, str):
        return Check(name="torch", verdict="fail", value=facts, fix=fix)
    build = f"CUDA {facts['cuda_build']}" if facts["cuda_build"] else "CPU build"
    value = f"{facts['version']}, {build}, {facts['capability']}, {facts['threads']} threads"
    version = tuple(int(part) for part in facts["version"].split("+")[0].split(".")[:2])
    if version < _MIN_TORCH:
        return Check(name="torch", verdict="fail", value=value, fix=fix)
    return Check(name="torch", verdict="ok", value=value)


def _gpu(gpu: Gpu | None, why_not: str, facts: dict[str, Any] | str) -> Check:
    if gpu is None:
        return Check(name="cuda", verdict="ok", value=f"none: {why_not}")
    memory = f"{format_bytes(gpu.free_bytes)} free of {format_bytes(gpu.memory_bytes)}"
    value = f"{gpu.name}, {memory}, driver {gpu.driver}"
    if isinstance(facts, str) or not facts["cuda_build"]:
        fix = "install torch's CUDA build (see pytorch.org), or run with --device cpu"
        return Check(name="cuda", verdict="warn", value=value, fix=fix)
    if not facts["cuda"]:
        fix = f"update the driver to one for CUDA {facts['cuda_build']}, or install torch for an older CUDA"
        return Check(name="cuda", verdict="fail", value=value, fix=fix)
    if gpu.compute_capability < (8, 0):
        fix = "use a GPU of compute capability 8.0 or newer, or run with --device cpu"
        return Check(name="cuda", verdict="fail", value=value, fix=fix)
    return Check(name="cuda", verdict="ok", value=value)


def _triton(has_gpu: bool, facts: dict[str, Any] | str) -> Check:
    version = None if isinstance(facts, str) else facts["triton"]
    if version is not None:
        return Check(name="triton", verdict="ok", value=version)
    if not has_gpu:
        return Check(name="triton", verdict="ok", value="not installed; only a GPU uses it")
    return Check(
        name="triton", verdict="warn", value="not installed", fix=f"{sys.executable} -m pip install triton"
    )


def _shared_memory(path: Path) -> Check:
    if not path.is_dir():
        return Check(name="shared memory", verdict="ok", value=f"no {path} here")
    total_bytes = shutil.disk_usage(path).total
    if total_bytes > _MIN_SHM_BYTES:
        return Check(name="shared memory", verdict="ok", value=f"{format_bytes(total_bytes)} at {path}")
    return Check(
        name="shared memory",
        verdict="warn",
        value=f"{format_bytes(total_bytes)} at {path}",
        fix="start the container with --shm-size 1g",
    )


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _MIN_OPEN_FILES:
        return Check(name="open files", verdict="ok", value=f"limit {soft}")
    reachable = _MIN_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MIN_OPEN_FILES)
    fix = f"ulimit -n {reachable}, so that many clients can be connected at once"
    return Check(name="open files", verdict="warn", value=f"limit {soft} (hard {hard})", fix=fix)


def _writable(name: str, directory: Path) -> Check:
    """Try the nearest existing parent, so that looking creates nothing."""
    existing = next(parent for parent in (directory, *directory.parents) if parent.exists())
    fix = "set XDG_CACHE_HOME to a directory on a disk you may write to"
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Check(name=name, verdict="fail", value=f"{directory} cannot be written", fix=fix)
    try:
        with tempfile.TemporaryFile(dir=existing) as stream:
            stream.write(b"x")
    except OSError as error:
        return Check(name=name, verdict="fail", value=f"{directory}: {error.strerror}", fix=fix)
    free_bytes = shutil.disk_usage(existing).free
    value = f"{directory}, {format_bytes(free_bytes)} free"
    if free_bytes >= _LOW_DISK_BYTES:
        return Check(name=name, verdict="ok", value=value)
    return Check(name=name, verdict="warn", value=value, fix="free some space, or " + fix)


def _hub_cache(environ: Mapping[str, str]) -> Check:
    home = environ.get("HF_HOME")
    cache = environ.get("XDG_CACHE_HOME") or str(Path(environ.get("HOME") or Path.home()) / ".cache")
    directory = Path(environ.get("HF_HUB_CACHE") or Path(home or Path(cache) / "huggingface") / "hub")
    if not directory.is_dir():
        return Check(name="model cache", verdict="ok", value=f"{directory} (empty)")
    n_models = sum(1 for path in directory.glob("models--*") if path.is_dir())
    return Check(name="model cache", verdict="ok", value=f"{directory}, {n_models} models")


def _offline(environ: Mapping[str, str]) -> Check:
    is_offline = environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    value = (
        "HF_HUB_OFFLINE is set: nothing is downloaded" if is_offline else "no: --download may fetch models"
    )
    return Check(name="offline", verdict="ok", value=value)


def _loopback(port: int) -> Check:
    def bind() -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", port))
            except OSError as error:
                is_taken = error.errno == errno.EADDRINUSE
                why = "another program listens there" if is_taken else error.strerror
                raise OSError(error.errno, f"127.0.0.1:{port}: {why}") from error
        return f"127.0.0.1:{port} is free"

    return _tried("port", bind, "warn", "serve on another one with --port, or on any free one with --port 0")


def _unix_socket() -> Check:
    def bind() -> str:
        with (
            tempfile.TemporaryDirectory(prefix="sailfish-") as directory,
            socket.socket(socket.AF_UNIX) as listener,
        ):
            listener.bind(str(Path(directory) / "doctor.sock"))
            return f"work in {Path(directory).parent}"

    return _tried("unix sockets", bind, "fail", "set TMPDIR to a short path on a local disk")


def _tried(name: str, attempt: Callable[[], str], verdict: Verdict, fix: str) -> Check:
    try:
        return Check(name=name, verdict="ok", value=attempt())
    except OSError as error:
        return Check(name=name, verdict=verdict, value=error.strerror or str(error), fix=fix)
