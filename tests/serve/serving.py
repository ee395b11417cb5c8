"""A real server on a free loopback port, as tests hold it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import httpx
from fake_engine import FakeEngine

from sailfish.serve.server import ApiServer

WAIT_S = 120.0
"""How long anything may take on a slow and busy machine; only what fails takes so long."""


@dataclass
class Running:
    """A server at work in its own thread."""

    engine: FakeEngine
    server: ApiServer
    port: int
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def client(self, **headers: str) -> httpx.Client:
        """Return a fresh HTTP client."""
        # Reading the certificates that plain HTTP needs none of takes 30 ms a client.
        return httpx.Client(base_url=self.url, headers=headers, timeout=WAIT_S, verify=False)

    def connect(self) -> socket.socket:
        """Return a bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S)

    def raw(self, data: bytes) -> bytes:
        """Send bytes and return all that comes back until the server closes."""
        with self.connect() as connection:
            connection.sendall(data)
            return read_all(connection)

    def call(self, function: Callable[[], Any]) -> None:
        """Run a function in the server's loop."""
        self.loop.call_soon_threadsafe(function)

    def wait(self, event: asyncio.Event) -> None:
        """Wait for an event of the server's loop."""
        future: Future[bool] = asyncio.run_coroutine_threadsafe(event.wait(), self.loop)  # type: ignore[arg-type]
        future.result(WAIT_S)

    def wait_until_idle(self) -> None:
        """Wait until the server has noticed that everybody is gone; raises TimeoutError."""

        async def idle() -> None:
            async with asyncio.timeout(WAIT_S):
                while self.server.site.live:
                    await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(idle(), self.loop).result()

    def is_fine(self) -> bool:
        """Tell whether an ordinary request is answered."""
        with self.client() as client:
            reply = client.post("/v1/completions", json={"model": "fake", "prompt": "ab", "max_tokens": 2})
        return reply.status_code == 200 and reply.json()["choices"][0]["text"] == "ab"


def read_all(connection: socket.socket) -> bytes:
    """Read until the peer closes; a reset counts as the end."""
    data = b""
    try:
        while part := connection.recv(65_536):
            data += part
    except ConnectionResetError:
        pass
    return data
