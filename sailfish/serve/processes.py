"""Starts additional API processes on a shared listening socket, restarts and ends them."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import msgspec

from sailfish.base.config import ServeConfig
from sailfish.base.errors import EngineError
from sailfish.serve.server import READY

log = logging.getLogger(__name__)

_RESTART_S = 1.0
_START_S = 30.0
_SLACK_S = 10.0
"""After `drain_s`, what a process may take to end before it is killed."""


class ApiProcesses:
    """The API processes besides this one, as an async context: inside it they serve."""

    def __init__(
        self,
        config: ServeConfig,
        listener: socket.socket,
        engine_socket: Path,
        *,
        chat_template: Path | None = None,
    ) -> None:
        self._config = config
        self._listener = listener
        self._command = [
            *(sys.executable, "-m", "sailfish.serve.api_process", "--fd", str(listener.fileno())),
            *("--engine-socket", str(engine_socket)),
            *("--log-level", logging.getLevelName(log.getEffectiveLevel()).lower()),
            *(() if chat_template is None else ("--chat-template", str(chat_template))),
        ]
        self._processes: list[asyncio.subprocess.Process] = []
        self._watchers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> ApiProcesses:
        for _ in range(self._config.api_processes - 1):
            self._processes.append(await self._start())
        self._watchers = [asyncio.create_task(self._watch(i)) for i in range(len(self._processes))]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tell()  # whoever drains yet has been told before, and stops now
        for process in self._processes:
            try:
                await asyncio.wait_for(process.wait(), self._config.drain_s + _SLACK_S)
            except TimeoutError:
                process.kill()
                await process.wait()

    async def drain(self) -> None:
        """Tell every process to end its requests and itself, and return when they have."""
        self._tell()
        await asyncio.gather(*(process.wait() for process in self._processes))

    @property
    def pids(self) -> Sequence[int]:
        """Ids of the processes that serve now."""
        return [process.pid for process in self._processes]

    def _tell(self) -> None:
        """Send the signal that drains at first and stops when it comes again; who died stays dead."""
        for watcher in self._watchers:
            watcher.cancel()
        for process in self._processes:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)

    async def _start(self) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=pipe,
            stdout=pipe,
            pass_fds=[self._listener.fileno()],
            start_new_session=True,  # a terminal's Ctrl-C reaches this process alone, which tells them once
        )
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(msgspec.json.encode(self._config) + b"\n")
        await process.stdin.drain()
        said = await asyncio.wait_for(process.stdout.readline(), _START_S)
        if said.decode().strip() != READY:
            raise EngineError(f"an API process ended at its start with status {await process.wait()}")
        return process

    async def _watch(self, i: int) -> None:
        while True:
            status = await self._processes[i].wait()
            log.error("API process %d ended with status %d; starting another", self._processes[i].pid, status)
            await asyncio.sleep(_RESTART_S)
            try:
                self._processes[i] = await self._start()
            except (EngineError, TimeoutError, OSError) as error:
                log.error("no API process could be started: %s", error)
