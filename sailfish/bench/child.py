"""What a process of a measurement and its parent hold to: READY once it serves, an end with its parent."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from sailfish.base.errors import EngineError
from sailfish.engine.api import EngineInfo
from sailfish.engine.endpoint import Endpoint
from sailfish.engine.launch import wait_or_kill
from sailfish.engine.loop import EngineLoop, Runner
from sailfish.engine.scheduler import Scheduler

_STOP_S = 20.0


class Child:
    """A process that is READY."""

    def __init__(self, words: list[str], output: IO[str]) -> None:
        self.words = words
        """What it said after READY."""
        self._output = output

    def line(self) -> str:
        """Return the next line that it writes; raises EngineError where it ended instead."""
        said = self._output.readline()
        if not said:
            raise EngineError("a process of the measurement ended early", hint="see what it wrote above")
        return said


@contextlib.contextmanager
def child(module: str, *flags: str) -> Iterator[Child]:
    """Run `python -m module` with its standard input open, and end it in the end."""
    command = [sys.executable, "-m", module, *flags]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdin is not None
    try:
        words = process.stdout.readline().split()
        if not words or words[0] != "READY":
            raise EngineError(
                f"`python -m {module}` ended before it was ready", hint="see what it wrote above"
            )
        yield Child(words[1:], process.stdout)
    finally:
        process.send_signal(signal.SIGTERM)
        process.stdin.close()
        wait_or_kill(process, _STOP_S)
        process.stdout.close()


def serve(socket: Path, info: EngineInfo, scheduler: Scheduler, runner: Runner, lag: int) -> None:
    """Say READY and drive a runner for clients of a socket, until standard input closes or SIGTERM comes."""
    endpoint = Endpoint(socket, info)
    loop = EngineLoop(scheduler, runner, endpoint.send, lag, lambda: 0)

    def end_with_parent() -> None:
        os.read(sys.stdin.fileno(), 1)
        loop.ask_to_end(0.0)

    signal.signal(signal.SIGTERM, lambda *_: loop.ask_to_end(0.0))
    threading.Thread(target=end_with_parent, daemon=True).start()
    endpoint.start(loop)
    sys.stdout.buffer.write(b"READY\n")
    sys.stdout.flush()
    try:
        loop.run()
    finally:
        endpoint.stop()
