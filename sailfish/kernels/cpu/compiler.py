"""Compiles the CPU's kernels with the C++ compiler that is there, once a level of instructions. No torch."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType

from sailfish.base.errors import EngineError
from sailfish.base.sources import cache_dir, environment

SOURCE_DIR = Path(__file__).parent / "source"
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
LEVELS: MappingProxyType[str, tuple[str, ...]] = MappingProxyType(
    {
        "avx512_bf16": (*_AVX512, "-mavx512bf16", "-mprefer-vector-width=512"),
        "avx512_vnni": (*_AVX512, "-mprefer-vector-width=512"),
        "avx_vnni": (*_AVX2, "-mavxvnni"),
        "avx2": _AVX2,
    }
)
"""The compiler's flags for each level of instructions, the best first."""
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=off", "-pthread")
_SHARED = ("-fPIC", "-shared", "-fvisibility=hidden")
_TIMEOUT_S = 300.0
log = logging.getLogger(__name__)


def find_compiler() -> tuple[str, ...] | None:
    """Return the C++ compiler's command: what CXX says, or the first of c++, g++ and clang++ on the PATH."""
    environ = environment()
    for words in (shlex.split(environ.get("CXX", "")), ["c++"], ["g++"], ["clang++"]):
        if words and (found := shutil.which(words[0], path=environ.get("PATH"))):
            return (found, *words[1:])
    return None


@cache
def takes(level: str) -> bool:
    """Say whether the compiler knows a level's instructions: old ones do not know the newest."""
    compiler = find_compiler()
    if compiler is None:
        return False
    command = (*compiler, *LEVELS[level], "-fsyntax-only", "-xc++", os.devnull)
    return subprocess.run(command, capture_output=True).returncode == 0


def missing() -> str | None:
    """Return why no kernels can be compiled on this machine, or None."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the kernels are written for x86-64, this machine is {platform.machine()}"
    if find_compiler() is None:
        return "no C++ compiler is installed (install g++ or clang++, or name one in CXX)"
    return None


def compiled(level: str) -> Path:
    """Return the shared library for a level, from the cache by (sources, compiler, flags) or compiled now.

    Processes that want the same one wait for the first. EngineError with the log if it does not compile.
    """
    directory = cache_dir() / "kernels"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"cpu-{level}-{_key(level)}.so"
        if path.exists():
            return path
        with (directory / f"cpu-{level}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                _build(level, path)
        return path
    except OSError:  # a read-only cache costs a compilation at every start, nothing else
        path = Path(_own_directory().name) / f"cpu-{level}.so"
        if not path.exists():
            _build(level, path)
        return path


def compile_to(out: Path, flags: Sequence[str], sources: Sequence[Path]) -> None:
    """Compile and link sources with `flags` beside the common ones; EngineError with the log if it fails."""
    compiler = find_compiler()
    if compiler is None:
        raise EngineError(f"the CPU's kernels cannot be compiled: {missing()}")
    command = [*compiler, *_FLAGS, *flags, f"-I{SOURCE_DIR}", *map(str, sources), "-o", str(out)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"{shlex.join(compiler)} did not end within {_TIMEOUT_S:g} s") from error
    if done.returncode != 0:
        raise EngineError(
            f"{shlex.join(compiler)} does not compile the CPU's kernels: {done.stderr.strip()}",
            hint="report this with the log",
        )


def _build(level: str, path: Path) -> None:
    log.info("compiling the CPU's kernels for %s, once for this version", level)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".so", delete=False) as part:
        pass
    try:
        compile_to(Path(part.name), (*_SHARED, *LEVELS[level]), sorted(SOURCE_DIR.glob("*.cpp")))
        os.replace(part.name, path)
    except BaseException:
        Path(part.name).unlink(missing_ok=True)
        raise


def _key(level: str) -> str:
    digest = hashlib.sha256(repr((_compiler_version(), _FLAGS, _SHARED, LEVELS[level])).encode())
    for source in sorted((*SOURCE_DIR.glob("*.cpp"), *SOURCE_DIR.glob("*.h"))):
        digest.update(source.name.encode())
        digest.update(source.read_bytes())
    return digest.hexdigest()[:24]


@cache
def _compiler_version() -> str:
    compiler = find_compiler()
    if compiler is None:
        raise EngineError(f"the CPU's kernels cannot be compiled: {missing()}")
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    return f"{shlex.join(compiler)} {version}"


@cache
def _own_directory() -> tempfile.TemporaryDirectory[str]:
    """Return a directory that is removed when this process ends."""
    return tempfile.TemporaryDirectory(prefix="sailfish-")
