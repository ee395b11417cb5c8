"""Answers while the engine loads: alive, not ready, and why; every other request is asked to come again."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Generator
from functools import partial
from http import HTTPStatus
from types import TracebackType

import uvicorn
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router

from sailfish.base.config import ServeConfig
from sailfish.serve import health
from sailfish.serve.errors import Refusal
from sailfish.serve.gateway.gate import Gate
from sailfish.serve.server import uvicorn_config
from sailfish.serve.site import Door

_RETRY_S = 2.0


class WaitingRoom:
    """Serve on a listening socket from entry to exit; the socket itself stays open for what comes next."""

    def __init__(self, config: ServeConfig, listener: socket.socket) -> None:
        self._door = Door.of(config)
        self._door.closed, self._door.closed_code = "the engine is loading", "loading"
        self._listener = listener
        routes = [
            Route("/livez", partial(health.livez, self._door)),
            Route("/readyz", partial(health.readyz, self._door)),
            Route("/version", partial(health.version, self._door)),
            Route("/{path:path}", self._refuse, methods=["GET", "POST"]),
        ]
        app = Gate(Router(routes, redirect_slashes=False), self._door)
        self._server = _Quiet(uvicorn_config(app, self._door))
        self._serving: asyncio.Task[None] | None = None

    def tell(self, stage: str) -> None:
        """Say what the engine is doing, for whoever asks /readyz."""
        self._door.closed = f"the engine is loading: {stage}"

    async def __aenter__(self) -> WaitingRoom:
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._listener.dup()]))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._serving is not None
        self._server.should_exit = True
        await self._serving

    async def _refuse(self, _: Request) -> Response:
        reason = self._door.closed or ""
        raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, self._door.closed_code, reason, retry_after_s=_RETRY_S)


class _Quiet(uvicorn.Server):
    """uvicorn's server, leaving signals to its owner."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield
