"""The doctor on this machine and on made-up ones: it never raises, and every complaint has a fix."""

from __future__ import annotations

import errno
import json
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sailfish.hardware import doctor
from sailfish.hardware.doctor import Check, as_data, diagnose, is_healthy
from sailfish.hardware.probe import Gpu
from sailfish.hardware.profile import GIB

TORCH = {
    "version": "2.11.0+cu130",
    "threads": 8,
    "cuda_build": "13.0",
    "capability": "AVX512",
    "cuda": True,
    "bf16": True,
    "device": "NVIDIA H200",
    "triton": "3.6.0",
}
H200 = Gpu(
    name="NVIDIA H200",
    compute_capability=(9, 0),
    memory_bytes=140 * GIB,
    free_bytes=139 * GIB,
    driver="580.65",
)
Examine = Callable[..., dict[str, Check]]


@pytest.fixture
def examine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Examine:
    """Run the doctor with given torch facts and GPU, and return the checks by name."""

    def run(
        torch: dict[str, Any] | str = TORCH,
        gpu: Gpu | None = H200,
        environ: dict[str, str] | None = None,
        cache_dir: Path = tmp_path / "cache",
        port: int = 0,
    ) -> dict[str, Check]:
        monkeypatch.setattr(doctor, "_ask_torch", lambda _: torch)
        monkeypatch.setattr(doctor, "find_gpu", lambda _: (gpu, "" if gpu else "no driver"))
        checks = diagnose(environ or {"HOME": str(tmp_path)}, cache_dir=cache_dir, port=port)
        assert all(bool(check.fix) == (check.verdict != "ok") for check in checks)
        assert all(check.value and "\n" not in check.value for check in checks)
        return {check.name: check for check in checks}

    return run


def test_every_part_of_the_machine_is_looked_at(examine: Examine) -> None:
    assert list(examine()) == [
        "python",
        "platform",
        "cpu",
        "cores",
        "memory",
        "torch",
        "cuda",
        "triton",
        "shared memory",
        "open files",
        "engine cache",
        "model cache",
        "offline",
        "port",
        "unix sockets",
    ]


def test_looking_creates_nothing(examine: Examine, tmp_path: Path) -> None:
    examine()
    assert list(tmp_path.iterdir()) == []


def test_the_result_is_json_and_healthy_only_without_a_failure() -> None:
    good = Check(name="a", verdict="ok", value="1")
    warned = Check(name="b", verdict="warn", value="2", fix="do")
    bad = Check(name="c", verdict="fail", value="3", fix="do")
    assert is_healthy([good, warned]) and not is_healthy([good, bad])
    assert json.loads(json.dumps(as_data([good, bad])))["checks"][1]["fix"] == "do"


def test_a_missing_torch_fails_with_the_command_that_installs_it(examine: Examine) -> None:
    check = examine(torch="ModuleNotFoundError: No module named 'torch'", gpu=None)["torch"]
    assert check.verdict == "fail"
    assert check.fix == f"{sys.executable} -m pip install 'torch>=2.11'"


def test_an_old_torch_fails(examine: Examine) -> None:
    assert examine(torch=TORCH | {"version": "2.9.1"})["torch"].verdict == "fail"


@pytest.mark.parametrize(
    ("torch", "gpu", "verdict", "fix"),
    [
        (TORCH, H200, "ok", ""),
        (TORCH, None, "ok", ""),
        (TORCH | {"cuda_build": None}, H200, "warn", "CUDA build"),
        (TORCH | {"cuda": False}, H200, "fail", "update the driver"),
        (
            TORCH,
            Gpu(name="T4", compute_capability=(7, 5), memory_bytes=1, free_bytes=1, driver="1"),
            "fail",
            "8.0",
        ),
    ],
)
def test_the_gpu_is_judged_with_the_torch_beside_it(
    examine: Examine, torch: dict[str, Any], gpu: Gpu | None, verdict: str, fix: str
) -> None:
    check = examine(torch=torch, gpu=gpu)["cuda"]
    assert check.verdict == verdict and fix in check.fix


def test_triton_matters_only_beside_a_gpu(examine: Examine) -> None:
    without = TORCH | {"triton": None}
    assert examine(torch=without, gpu=None)["triton"].verdict == "ok"
    assert examine(torch=without)["triton"].verdict == "warn"


def test_a_low_limit_of_open_files_names_the_ulimit_to_set(
    examine: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 524288))
    check = examine()["open files"]
    assert check.verdict == "warn" and check.fix.startswith("ulimit -n 4096")


def test_a_cache_below_a_file_cannot_be_written(examine: Examine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check = examine(cache_dir=tmp_path / "file" / "cache")["engine cache"]
    assert check.verdict == "fail" and "XDG_CACHE_HOME" in check.fix


def test_a_taken_port_is_a_warning_with_the_flag_to_give(examine: Examine) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        check = examine(port=port)["port"]
    assert check.verdict == "warn" and "--port" in check.fix
    assert check.value == f"127.0.0.1:{port}: another program listens there"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (OSError("AF_UNIX path too long"), "AF_UNIX path too long"),
    ],
)
def test_a_socket_that_cannot_be_had_is_told_in_words(
    examine: Examine, monkeypatch: pytest.MonkeyPatch, error: OSError, said: str
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(socket.socket, "bind", refuse)
    assert examine()["unix sockets"].value == said


def test_the_model_cache_is_counted_where_the_environment_puts_it(examine: Examine, tmp_path: Path) -> None:
    (tmp_path / "hub" / "models--a--b").mkdir(parents=True)
    check = examine(environ={"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"})
    assert check["model cache"].value.endswith("1 models")
    assert "nothing is downloaded" in check["offline"].value


def test_torch_is_asked_in_another_process_and_a_crash_there_is_a_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def crash(command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(
            command, 1, "", "Traceback\nImportError: libcudart.so is missing\n"
        )

    monkeypatch.setattr(subprocess, "run", crash)
    assert doctor._ask_torch({}) == "ImportError: libcudart.so is missing"
