"""Processes start, share and end as they should, whatever is killed, locked, damaged or missing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from live import COMMAND, SMALL, WAIT_S, ask, descendants, engine_of, is_alive, streams, typed, until

from sailfish.bench.server import ServerProcess
from sailfish.build.builder import build_engine
from sailfish.data import demo_model

pytestmark = pytest.mark.slow


@pytest.fixture
def starting() -> Iterator[subprocess.Popen[str]]:
    """A server whose engine process exists but is not ready yet."""
    process = subprocess.Popen(
        [*COMMAND, "serve", "books-4m", "--port", "0", *SMALL],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        engine_of(process.pid)
        yield process
    finally:
        process.kill()
        process.communicate()


def directory_of(engine: psutil.Process) -> Path:
    """Return the private directory of an engine's socket."""
    words = engine.cmdline()
    return Path(words[words.index("--socket") + 1]).parent


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_told_to_end_while_it_loads_ends_cleanly(
    starting: subprocess.Popen[str], number: signal.Signals
) -> None:
    engine = engine_of(starting.pid)
    starting.send_signal(number)
    said, logged = starting.communicate(timeout=WAIT_S)
    assert starting.returncode == 128 + number
    assert "READY" not in said
    assert "Traceback" not in logged, logged
    assert not is_alive(engine)


def test_an_engine_that_still_loads_ends_when_its_server_is_killed(starting: subprocess.Popen[str]) -> None:
    engine = engine_of(starting.pid)
    directory = directory_of(engine)
    assert directory.exists()
    starting.kill()
    until(lambda: not is_alive(engine), "the engine is gone")
    assert not directory.exists()


def test_an_engine_at_work_ends_when_its_server_is_killed() -> None:
    with ServerProcess("books-4m", *SMALL) as server:
        engine = engine_of(server.pid)
        streams(server.url, 2)
        directory = directory_of(engine)
        os.kill(server.pid, signal.SIGKILL)
        until(lambda: not is_alive(engine), "the engine is gone")
        assert not directory.exists()


def test_an_engine_told_to_end_drains_and_is_replaced() -> None:
    with ServerProcess("books-4m", *SMALL) as server:
        engine = engine_of(server.pid)
        [stream] = streams(server.url, 1)
        engine.send_signal(signal.SIGTERM)
        stream.result().check(1)
        assert stream.streamed.finishes[0] == ["length"]
        until(lambda: not is_alive(engine), "the engine has ended")
        said = "the engine process ended with status 0; starting another"
        until(lambda: said in server.log(), "the log says so")
        until(lambda: ask(server.url).status_code == 200, "the next one answers")


def test_commands_that_need_one_engine_at_once_build_it_once(tmp_path: Path) -> None:
    environ = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    running = [
        subprocess.Popen(
            [
                *COMMAND,
                "explain",
                "books-4m",
                "--json",
                "--memory",
                "1GiB",
            ],  # not a share of what is free now
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    ended = [process.communicate(timeout=WAIT_S) for process in running]
    assert [process.returncode for process in running] == [0] * 4, ended
    assert len({said for said, _ in ended}) == 1
    assert (
        sorted(logged.split(":")[0] for _, logged in ended)
        == ["engine built"] + ["engine found in the cache"] * 3
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine directory that holds its own weights."""
    directory = tmp_path_factory.mktemp("bundle") / "whole.engine"
    build_engine(demo_model(), directory, bundle=True, target="cpu")
    return directory


def truncate(path: Path) -> None:
    """Keep the first half of a file."""
    path.chmod(0o644)
    os.truncate(path, path.stat().st_size // 2)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "weights cut off": lambda engine: truncate(next(engine.glob("*.bin"))),
    "weights gone": lambda engine: next(engine.glob("*.bin")).unlink(),
    "manifest cut off": lambda engine: truncate(next(engine.glob("*.json"))),
    "tokenizer gone": lambda engine: (engine / "tokenizer.json").unlink(),
    "tokenizer cut off": lambda engine: truncate(engine / "tokenizer.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_engine_is_named_and_nothing_is_left_running(
    bundle: Path, tmp_path: Path, damage: str
) -> None:
    shutil.copytree(bundle, tmp_path / "damaged.engine")
    DAMAGES[damage](tmp_path / "damaged.engine")
    done = typed("serve", "damaged.engine", "--port", "0", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "READY" not in done.stdout
    assert "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert not descendants(psutil.Process().pid, "sailfish.engine.worker")


def test_an_engine_nobody_may_write_to_is_served(bundle: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write to everything")
    engine = tmp_path / "read-only.engine"
    shutil.copytree(bundle, engine)
    for path in (*engine.iterdir(), engine):
        path.chmod(0o555)
    done = typed("generate", str(engine), "It was", "--max-tokens", "4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / "in.jsonl").write_text('{"prompt": "It was", "max_tokens": 2}\n')
    done = typed("generate", "books-4m", "--jsonl-in", "in.jsonl", "--jsonl-out", "/dev/full", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr, done.stderr
    assert "No space left on device" in done.stderr.splitlines()[-1]
    assert not descendants(psutil.Process().pid, "sailfish.engine.worker")


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on() -> None:
    command = [*COMMAND, "chat", "books-4m", "--temperature", "0", "--ignore-eos"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as chat:
        assert chat.stdin is not None and chat.stdout is not None
        chat.stdin.write("Hello\n")
        chat.stdin.flush()
        assert chat.stdout.read(1)
        chat.send_signal(signal.SIGINT)
        said, logged = chat.communicate("/exit\n", timeout=WAIT_S)
    assert chat.returncode == 0, logged
    assert "(stopped)" in said
    assert "Traceback" not in logged, logged
