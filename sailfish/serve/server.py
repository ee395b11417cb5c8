"""Runs one API process: binds, serves, drains on the first signal, stops on the second."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
from collections.abc import Callable, Coroutine, Generator, Sequence
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from sailfish.base.config import ServeConfig
from sailfish.base.errors import ConfigError
from sailfish.serve.gateway.auth import load_keys
from sailfish.serve.gateway.gate import is_loopback
from sailfish.serve.gateway.limits import LIMITS, Limits
from sailfish.serve.gateway.protocol import guarded
from sailfish.serve.port import EnginePort
from sailfish.serve.routes import create_app
from sailfish.serve.site import Door, Site

READY = "READY"
"""How a process says on standard output that it serves; a server's address follows."""
_REPORT_S = 1.0
_UNACCEPTED = 1024
"""Connections that the system keeps until a process takes them."""
_ACCEPTED_AT_ONCE = 32
"""Connections that a process takes before it goes on with its others, so that several share a rush."""
_FAREWELL_S = 5
"""After the drain's end, what interrupted replies may take to say so."""


async def run(
    engine: EnginePort,
    config: ServeConfig,
    sockets: Sequence[socket.socket],
    *,
    limits: Limits = LIMITS,
    on_ready: Callable[[], None] | None = None,
    on_drain: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> None:
    """Serve until a signal came and what was running has ended. The caller closes the engine.

    `on_drain` drains what serves beside this process; until it returns, this one goes on listening.
    """
    await ApiServer(engine, config, limits=limits, on_drain=on_drain).run_on(sockets, on_ready)


def draining_signals() -> list[signal.Signals]:
    """Return the signals that end a server: SIGHUP too, unless `nohup` had it ignored."""
    hangs_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hangs_up else [])]


def bind(config: ServeConfig) -> socket.socket:
    """Return a listening socket; raise ConfigError when it would be open to strangers or is taken."""
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)
    except (socket.gaierror, OverflowError) as error:
        raise ConfigError(
            f"host {config.host!r} port {config.port} is no address to listen on", hint="use 127.0.0.1"
        ) from error
    family, _, protocol, _, address = found[0]
    if not is_loopback(str(address[0])) and not len(load_keys(config)):
        raise ConfigError(
            f"refusing to listen on {config.host}: others can reach it, and no API key is set",
            hint="set SAILFISH_API_KEYS or --api-keys-file, or listen on 127.0.0.1",
        )
    listener = socket.socket(family, socket.SOCK_STREAM, protocol)  # asyncio sets NODELAY by the protocol
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_UNACCEPTED)
    except OSError as error:
        listener.close()
        why = "another program listens there" if error.errno == errno.EADDRINUSE else error.strerror
        raise ConfigError(
            f"cannot listen on {config.host} port {config.port}: {why}",
            hint="choose another --port, 0 takes a free one",
        ) from error
    listener.setblocking(False)
    return listener


def uvicorn_config(app: ASGIApp, door: Door) -> uvicorn.Config:
    """Return how uvicorn serves an application of ours: guarded, silent, without extras."""
    return uvicorn.Config(
        app,
        http=guarded(door.limits, door.counters),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=int(door.limits.idle_s),
        timeout_graceful_shutdown=_FAREWELL_S,
    )


class ApiServer(uvicorn.Server):
    """uvicorn's server with a drain during which it still listens, to say that it is not ready."""

    def __init__(
        self,
        engine: EnginePort,
        config: ServeConfig,
        *,
        limits: Limits = LIMITS,
        on_drain: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        door = Door.of(config, limits)
        self.site = Site(
            engine=engine,
            model=config.served_model_name or engine.info.name,
            keys=door.keys,
            origins=door.origins,
            limits=limits,
            vllm_metrics=config.vllm_metrics,
        )
        super().__init__(uvicorn_config(create_app(self.site), self.site))
        self.config.backlog = _ACCEPTED_AT_ONCE  # which asyncio takes for both
        self._drain_s = config.drain_s
        self._drain_ends_at_s: float | None = None
        self._on_drain = on_drain
        self._elsewhere: asyncio.Task[None] | None = None
        self._on_ready: Callable[[], None] | None = None

    async def run_on(
        self, sockets: Sequence[socket.socket], on_ready: Callable[[], None] | None = None
    ) -> None:
        """Serve on listening sockets until the drain is over."""
        self._on_ready = on_ready
        reporting = asyncio.create_task(self._report_for_ever())
        try:
            await self.serve(sockets=list(sockets))
        finally:
            tasks = [reporting] if self._elsewhere is None else [reporting, self._elsewhere]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen, and say so."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(_UNACCEPTED)
        if self._on_ready is not None:
            self._on_ready()

    def drain(self) -> None:
        """Take no new requests; stop when those at work have ended or `drain_s` has passed."""
        self.site.closed = "the server is draining"
        if self._drain_ends_at_s is None:
            self._drain_ends_at_s = asyncio.get_running_loop().time() + self._drain_s
            if self._on_drain is not None:
                self._elsewhere = asyncio.create_task(self._on_drain())

    def stop_now(self) -> None:
        """End the requests at work with an error, then stop."""
        self.site.closed = "the server is stopping"
        self.site.interrupt()
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """End the drain when it is over (called ten times a second)."""
        if self._drain_ends_at_s is not None:
            is_late = asyncio.get_running_loop().time() >= self._drain_ends_at_s
            is_done_elsewhere = self._elsewhere is None or self._elsewhere.done()
            if is_late or (is_done_elsewhere and not self.site.live):
                self.stop_now()
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain on the first signal, stop on the second."""
        if self._drain_ends_at_s is None:
            self.drain()
        else:
            self.stop_now()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Handle signals inside the loop, and swallow them: the caller still has to clean up."""
        loop, signals = asyncio.get_running_loop(), draining_signals()
        try:
            for number in signals:
                loop.add_signal_handler(number, self.handle_exit, number, None)
        except (ValueError, RuntimeError):  # not the main thread: the owner calls `drain` itself
            yield
            return
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    async def _report_for_ever(self) -> None:
        while True:
            self.site.engine.report(self.site.counters.flat())
            await asyncio.sleep(_REPORT_S)
