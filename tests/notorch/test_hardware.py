"""Hardware profiles, the probe on made-up machines, and the readers of memory and time."""

from __future__ import annotations

import ctypes
import mmap
import os
import stat
import sys
from pathlib import Path

import pytest

from sailfish.base.errors import ConfigError
from sailfish.hardware.memory import anonymous_bytes, prefer_large_pages, resident_bytes, trim_heap
from sailfish.hardware.probe import (
    cgroup_memory,
    cpu_cores,
    find_gpu,
    probe,
    probe_cpu,
    profile_of_gpu,
)
from sailfish.hardware.profile import GIB, MIB, PROFILES, TARGETS, HardwareProfile, profile
from sailfish.hardware.timing import Timer

MEMINFO = "MemTotal:       16777216 kB\nMemFree:  1024 kB\nMemAvailable:    8388608 kB\n"
CPUINFO = (
    "processor : 0\nmodel name : Made CPU\nflags : fpu avx2 fma avx512f avx512_bf16 amx_tile hypervisor\n\n"
)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A made-up root with /proc of a 16 GiB machine."""
    write(tmp_path, "proc/meminfo", MEMINFO)
    write(tmp_path, "proc/cpuinfo", CPUINFO * 2)
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def fake_smi(directory: Path, answer: str, exit_code: int = 0) -> dict[str, str]:
    """Put an nvidia-smi on the PATH that answers so, and records its arguments."""
    tool = directory / "nvidia-smi"
    tool.write_text(
        f"#!/bin/sh\necho \"$@\" > {directory}/asked\ncat <<'END'\n{answer}\nEND\nexit {exit_code}\n"
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    return {"PATH": f"{directory}{os.pathsep}/bin{os.pathsep}/usr/bin"}


def test_a_profile_is_found_by_target_or_by_the_name_of_a_card() -> None:
    assert TARGETS == ("cpu", "sm_80", "sm_86", "sm_89", "sm_90")
    assert {target: profile(target).target for target in TARGETS} == {target: target for target in TARGETS}
    assert profile("H200").memory_bytes > profile("sm_90").memory_bytes
    assert profile("l40s").target == "sm_89"
    assert profile("sm_89").compute_capability == (8, 9)
    assert profile("cpu").compute_capability is None


@pytest.mark.parametrize("row", [row for row in PROFILES if row.device == "cuda"], ids=lambda row: row.name)
def test_a_card_is_found_by_its_name_as_printed(row: HardwareProfile) -> None:
    printed = row.name.removeprefix("NVIDIA ")
    for name in (row.name, printed, printed.upper(), f" {printed.lower()}", printed.removeprefix("GeForce ")):
        assert profile(name) is row


def test_an_unknown_profile_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="use cpu, sm_80, sm_86, sm_89, sm_90, or one of: A100"):
        profile("nvidia")
    with pytest.raises(ConfigError, match="no hardware profile is called '80GB'"):
        profile("80GB")


def test_keys_of_devices_are_distinct_and_fit_for_file_names() -> None:
    keys = [row.key for row in PROFILES]
    assert len(set(keys)) == len(keys)
    assert "sm_90-nvidia-h200" in keys
    assert all(set(key) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-") for key in keys)


def test_the_cpu_is_read_from_proc(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    found = probe_cpu(machine)
    assert (found.name, found.device, found.target, found.is_here) == ("Made CPU", "cpu", "cpu", True)
    assert (found.memory_bytes, found.free_bytes) == (16 * GIB, 8 * GIB)
    assert found.features == ("amx", "avx2", "avx512", "avx512_bf16", "fma")


def test_arm_features_have_their_own_names(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    write(machine, "proc/cpuinfo", "processor : 0\nFeatures : fp asimd bf16 i8mm\n")
    assert probe_cpu(machine).features == ("bf16", "i8mm", "neon")


def test_a_machine_without_proc_still_has_a_profile(tmp_path: Path) -> None:
    found = probe_cpu(tmp_path)
    assert 0 < found.free_bytes <= found.memory_bytes
    assert found.n_cores >= 1


def test_a_container_limit_lowers_memory_and_dropped_page_cache_is_free(machine: Path) -> None:
    write(machine, "proc/self/cgroup", "0::/kube/pod\n")
    write(machine, "sys/fs/cgroup/kube/pod/memory.max", f"{4 * GIB}\n".strip())
    write(machine, "sys/fs/cgroup/kube/pod/memory.current", str(3 * GIB))
    write(machine, "sys/fs/cgroup/kube/pod/memory.stat", f"anon 5\ninactive_file {2 * GIB}\n")
    write(machine, "sys/fs/cgroup/kube/memory.max", "max")
    assert cgroup_memory(machine) == [(4 * GIB, 1 * GIB)]
    found = probe_cpu(machine)
    assert (found.memory_bytes, found.free_bytes) == (4 * GIB, 3 * GIB)


def test_the_older_kind_of_container_limit_counts_too(machine: Path) -> None:
    write(machine, "proc/self/cgroup", "7:memory:/docker/1\n3:cpuset:/docker/1\n")
    write(machine, "sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes", str(2 * GIB))
    write(machine, "sys/fs/cgroup/memory/docker/1/memory.usage_in_bytes", str(GIB))
    write(machine, "sys/fs/cgroup/memory/memory.limit_in_bytes", str(2**63 - 4096))
    write(machine, "sys/fs/cgroup/memory/memory.usage_in_bytes", str(GIB))
    assert probe_cpu(machine).memory_bytes == 2 * GIB


def test_a_cpu_quota_caps_the_cores(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert cpu_cores(machine) == 8
    write(machine, "proc/self/cgroup", "0::/pod\n")
    write(machine, "sys/fs/cgroup/pod/cpu.max", "250000 100000")
    assert cpu_cores(machine) == 3
    write(machine, "sys/fs/cgroup/pod/cpu.max", "max 100000")
    assert cpu_cores(machine) == 8


def test_a_gpu_is_read_from_nvidia_smi(tmp_path: Path) -> None:
    environ = fake_smi(tmp_path, "NVIDIA H200, 9.0, 143771, 143000, 580.65.06")
    found = probe(None, environ=environ)
    assert (found.target, found.name, found.is_here) == ("sm_90", "NVIDIA H200", True)
    assert (found.memory_bytes, found.free_bytes) == (143771 * MIB, 143000 * MIB)
    assert found.bandwidth_bytes_per_s == 4.8e12
    assert "--id=0" in (tmp_path / "asked").read_text()


def test_a_gpu_that_no_row_names_has_no_rates_but_a_target(tmp_path: Path) -> None:
    gpu, _ = find_gpu(fake_smi(tmp_path, "NVIDIA B200, 10.0, 183359, 183000, 580.1"))
    assert gpu is not None
    found = profile_of_gpu(gpu)
    assert (found.target, found.bandwidth_bytes_per_s) == ("sm_100", None)


def test_the_first_visible_gpu_is_asked_for(tmp_path: Path) -> None:
    environ = fake_smi(tmp_path, "NVIDIA L40S, 8.9, 46068, 46000, 580.1")
    find_gpu({**environ, "CUDA_VISIBLE_DEVICES": "3,1"})
    assert "--id=3" in (tmp_path / "asked").read_text()


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus_are_not_there(tmp_path: Path, hidden: str) -> None:
    environ = fake_smi(tmp_path, "NVIDIA H200, 9.0, 143771, 143000, 580.65.06")
    environ["CUDA_VISIBLE_DEVICES"] = hidden
    assert probe(None, environ=environ).device == "cpu"
    with pytest.raises(ConfigError, match="hides every GPU"):
        probe("cuda", environ=environ)


@pytest.mark.parametrize(
    ("answer", "exit_code", "words"),
    [
        (
            "NVIDIA-SMI has failed because it couldn't communicate",
            9,
            "nvidia-smi says: NVIDIA-SMI has failed",
        ),
        ("nonsense", 0, "nvidia-smi answered 'nonsense'"),
        ("", 0, "nvidia-smi answered"),
    ],
)
def test_a_broken_driver_is_told_in_its_own_words(
    tmp_path: Path, answer: str, exit_code: int, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        probe("cuda", environ=fake_smi(tmp_path, answer, exit_code))
    assert words in str(caught.value) and "--device cpu" in str(caught.value)


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="device 'tpu' is unknown"):
        probe("tpu")


def test_the_resident_set_grows_by_what_is_touched() -> None:
    trim_heap()
    before = resident_bytes()
    block = bytearray(64 * MIB)  # one allocation, whose pages are touched next
    block[::4096] = b"x" * (len(block) // 4096)
    assert 60 * MIB <= resident_bytes() - before <= 70 * MIB
    assert anonymous_bytes() <= resident_bytes()
    assert len(block) == 64 * MIB


def test_a_timer_measures_from_its_start() -> None:
    timer = Timer("cpu")
    timer.start()
    first = timer.stop()
    assert 0 <= first <= timer.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux is asked for large pages")
def test_large_pages_are_asked_for_whole_pages_inside_of_the_range() -> None:
    with mmap.mmap(-1, 16 << 20) as memory:
        view = (ctypes.c_char * len(memory)).from_buffer(memory)
        address = ctypes.addressof(view)
        prefer_large_pages(address + 1, len(memory) - 2)
        flags = _flags_at(address + (8 << 20))
        del view
    assert flags is None or "hg" in flags.split()


def _flags_at(address: int) -> str | None:
    """Return what the kernel says of the mapping of an address; None: it says nothing."""
    is_inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            is_inside = start <= address < end
        elif is_inside and first == "VmFlags:":
            return line
    return None
