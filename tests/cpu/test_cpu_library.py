"""The CPU's library: every level compiles, this CPU's levels run, and its threads share work safely."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from sailfish.base.errors import EngineError
from sailfish.kernels.cpu import compiler, library

ABSENT = library.unavailable()
pytestmark = pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))
FORKS = """
import os
import numpy
from sailfish.kernels.cpu import library

read = library.function("sf_read_memory", "pip")
library.set_threads(4)
words = numpy.random.default_rng(0).integers(1 << 30, size=1 << 20, dtype=numpy.int32)
out = numpy.zeros(1, numpy.int32)
expected = numpy.bitwise_xor.reduce(words)
read(words.ctypes.data, words.nbytes, out.ctypes.data)
child = os.fork()
out[:] = 0
for _ in range(20):
    read(words.ctypes.data, words.nbytes, out.ctypes.data)
    assert out[0] == expected
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


def _xor(words: torch.Tensor, level: str | None = None) -> int:
    out = torch.zeros(1, dtype=torch.int32)
    library.function("sf_read_memory", "pip", level)(words.data_ptr(), words.nbytes, out.data_ptr())
    return int(out)


def _words(n: int, seed: int) -> tuple[torch.Tensor, int]:
    words = np.random.default_rng(seed).integers(-(2**31), 2**31, n, dtype=np.int32)
    return torch.from_numpy(words), int(np.bitwise_xor.reduce(words))


@pytest.mark.parametrize("level", compiler.LEVELS)
def test_every_level_compiles_and_the_second_time_comes_from_the_cache(level: str) -> None:
    path = compiler.compiled(level)
    made = path.stat().st_mtime_ns
    assert compiler.compiled(level) == path
    assert path.stat().st_mtime_ns == made


@pytest.mark.parametrize("level", library.levels())
def test_all_bytes_are_read_once_at_every_level(level: str) -> None:
    words, expected = _words((5 << 18) // 4 + 16, seed=1)
    assert _xor(words, level) == expected
    assert _xor(words[:0], level) == 0


def test_more_threads_than_cores_and_several_callers_lose_no_chunk() -> None:
    cases = [_words(n, seed=n) for n in (16, 1 << 16, 3 << 18, 1 << 20)]
    library.set_threads(8)
    try:
        with ThreadPoolExecutor(4) as callers:
            for words, expected in cases:
                for found in callers.map(_xor, [words] * 40):
                    assert found == expected
    finally:
        library.set_threads(library.usable_threads())


def test_a_forked_process_has_threads_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_threads_are_as_many_as_physical_cores_or_as_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for cpu in range(1024):
        path = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        path.parent.mkdir(parents=True)
        path.write_text("0-1023\n")
    assert library.usable_threads(tmp_path) == 1, "all are threads of one core"
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert library.usable_threads(tmp_path / "nowhere") >= 1
    for place, asked in enumerate(("1", "1,2")):
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        assert library.usable_threads(tmp_path / f"place {place}") == 1


def test_without_a_compiler_the_reason_is_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler" in (compiler.missing() or "")
    with pytest.raises(EngineError, match="no C\\+\\+ compiler"):
        compiler.compile_to(tmp_path / "out.so", (), [])


def test_the_doctor_names_the_level_or_the_way_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found = library.check()
    assert (found.verdict, found.fix) == ("ok", "") and library.levels()[0] in found.value
    monkeypatch.setattr(library, "unavailable", lambda: "no C++ compiler is installed")
    found = library.check()
    assert found.verdict == "warn" and "no C++ compiler" in found.value and "install g++" in found.fix


def test_a_source_that_does_not_compile_is_an_error_with_the_log(tmp_path: Path) -> None:
    source = tmp_path / "wrong.cpp"
    source.write_text("int wrong = undefined_name;")
    with pytest.raises(EngineError, match="undefined_name"):
        compiler.compile_to(tmp_path / "out.so", ("-shared",), [source])


def test_a_cache_that_cannot_be_written_costs_one_compilation_a_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "sailfish").write_text("no directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built: list[Path] = []

    def build(_level: str, path: Path) -> None:
        built.append(path)
        path.write_bytes(b"made")

    monkeypatch.setattr(compiler, "_build", build)
    found = [compiler.compiled("avx2"), compiler.compiled("avx2")]
    assert found == built * 2 and found[0].read_bytes() == b"made"


def _compiler(path: Path, script: str) -> str:
    """Return a command for CXX: a compiler that does what the script says."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    return f"/bin/sh {path}"


def test_what_an_old_compiler_does_not_know_is_no_level(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = " ".join(compiler.find_compiler() or ())
    refuses = f'case "$*" in *avx512*) exit 1;; *) exec {words} "$@";; esac'
    monkeypatch.setenv("CXX", _compiler(tmp_path / "old", refuses))
    takes = compiler.takes.__wrapped__
    assert {level for level in compiler.LEVELS if takes(level)} == {"avx_vnni", "avx2"}


def test_a_library_that_is_none_is_refused_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    empty = tmp_path / "empty.so"
    empty.touch()
    monkeypatch.setattr(compiler, "compiled", lambda _: empty)
    with pytest.raises(EngineError, match="do not load") as found:
        library._load.__wrapped__("avx2")
    assert str(empty) in str(found.value.hint)
