"""Makes llama.cpp ready to be measured beside us: fetched, built for this CPU, with models of our shape.

    python benchmarks/cpu_peers.py DIR

What lies in DIR already is kept. `sailfish bench cpu --peers DIR` measures it. CMake and Ninja are taken
from the PATH, or installed into DIR.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

from sailfish.base.sources import environment
from sailfish.bench.cpu import COLUMNS, SHAPE
from sailfish.bench.cpu_gguf import write_gguf
from sailfish.bench.shapes import random_checkpoint
from sailfish.hardware.probe import probe_cpu

PINNED = Path(__file__).with_suffix(".txt")
PROGRAMS = ("llama-bench", "llama-batched-bench", "llama-quantize", "llama-server")
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
}
"""The defaults, OpenMP among them, for this CPU; without what fetches more or takes long to build."""


def main() -> None:
    """Make what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    given = parser.parse_args().folder
    folder = given.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    n_cores = probe_cpu().n_cores
    if not all((folder / "bin" / program).exists() for program in PROGRAMS):
        _build(_source(folder), folder, n_cores)
    plain = folder / "BF16.gguf"
    if not plain.exists():
        _say(f"writing {plain}")
        write_gguf(random_checkpoint(SHAPE, environment(), _say), plain)
    for name in {name for column in COLUMNS.values() for name in column.rivals}:
        path = folder / f"{name}.gguf"
        if not path.exists():
            partial = path.with_suffix(".partial")
            _run(folder / "bin" / "llama-quantize", plain, partial, name, n_cores)
            partial.rename(path)
    _say(f"ready: sailfish bench cpu --peers {given}")


def _source(folder: Path) -> Path:
    """Fetch the pinned source distribution and return the folder of llama.cpp in it."""
    if not (folder / "source").exists():
        flags = ("--no-deps", "--no-binary", "llama-cpp-python", "--dest", folder)
        _run(sys.executable, "-m", "pip", "download", *flags, "-r", PINNED)
        [archive] = folder.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(archive) as file:
            file.extractall(folder / "unpacked", filter="data")
        [tree] = (folder / "unpacked").iterdir()
        tree.rename(folder / "source")
        (folder / "unpacked").rmdir()
    return folder / "source" / "vendor" / "llama.cpp"


def _build(source: Path, folder: Path, n_jobs: int) -> None:
    tools = {name: shutil.which(name) for name in ("cmake", "ninja")}
    if not all(tools.values()):
        venv.create(folder / "python", with_pip=True)
        _run(folder / "python" / "bin" / "python", "-m", "pip", "install", *tools)
        tools = {name: str(folder / "python" / "bin" / name) for name in tools}
    options = [f"-D{name}={value}" for name, value in OPTIONS.items()]
    _run(
        tools["cmake"],
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}",
        *options,
        "-S",
        source,
        "-B",
        folder,
    )
    _run(tools["cmake"], "--build", folder, "-j", n_jobs, "--target", *PROGRAMS)


def _run(*command: object) -> None:
    subprocess.run(list(map(str, command)), check=True)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
