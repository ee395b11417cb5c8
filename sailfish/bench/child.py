"""Runs one of our modules as a process that says READY, and ends it."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import IO

from sailfish.base.errors import EngineError

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
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
