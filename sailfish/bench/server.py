"""A real `sailfish serve` in a process of its own, for the demo, the walk and the end-to-end tests."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType

from sailfish.base.errors import EngineError
from sailfish.engine.launch import wait_or_kill
from sailfish.serve.server import READY

_STOP_S = 30.0


class ServerProcess:
    """Runs `sailfish serve MODEL --port 0`: once entered it is READY at `url`, once left it has ended."""

    def __init__(self, model: str | Path, *flags: str) -> None:
        self.command = [sys.executable, "-m", "sailfish.cli.main", "serve", str(model), "--port", "0", *flags]
        self.url = ""
        self.exit_code: int | None = None
        self.output: list[str] = []
        """Lines printed before READY."""
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed by stop

    def __enter__(self) -> ServerProcess:
        self._process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=self._log, text=True)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(READY):
                self.url = line.removeprefix(READY).strip()
                return self
            self.output.append(line.rstrip("\n"))
        status, said = self._process.wait(), self._said()
        self.stop()
        raise EngineError(f"`sailfish serve` ended with status {status}: {said}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._process.pid

    def stop(self) -> int:
        """Ask the server to drain and end; return its exit status. Idempotent."""
        if self.exit_code is None:
            self._process.send_signal(signal.SIGTERM)
            self.exit_code = wait_or_kill(self._process, _STOP_S)
            if self._process.stdout is not None:
                self._process.stdout.close()
            self._log.close()
        return self.exit_code

    def log(self) -> str:
        """Return what the server has logged so far."""
        self._log.seek(0)
        return self._log.read()

    def _said(self) -> str:
        lines = [line for line in self.log().splitlines() if line.strip()]
        return lines[-1].removeprefix("error: ") if lines else "it said nothing"
