"""Starts real servers for tests and stops them again."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from fake_engine import FakeEngine
from serving import WAIT_S, Running

from sailfish.base.config import ServeConfig
from sailfish.serve.gateway.limits import LIMITS, Limits
from sailfish.serve.server import ApiServer, bind


@contextmanager
def starting() -> Iterator[Callable[..., Running]]:
    """Yield a function that starts a server; all are stopped at the end."""
    running: list[Running] = []

    def run(
        engine: FakeEngine | None = None,
        *,
        config: ServeConfig | None = None,
        limits: Limits = LIMITS,
        **caps: Any,
    ) -> Running:
        ready: Future[Running] = Future()
        config = config or ServeConfig()
        listener = bind(replace(config, port=0))

        async def main() -> None:
            fake = engine or FakeEngine()
            server = ApiServer(fake, config, limits=replace(limits, **caps))
            loop = asyncio.get_running_loop()
            port = listener.getsockname()[1]
            me = Running(fake, server, port, loop, threading.current_thread())
            await server.run_on([listener], lambda: ready.set_result(me))

        thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
        thread.start()
        running.append(ready.result(WAIT_S))
        return running[-1]

    yield run
    for each in running:
        if each.thread.is_alive():
            each.call(each.server.stop_now)
        each.thread.join(WAIT_S)
        assert not each.thread.is_alive()


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    """Start servers that live as long as the test."""
    with starting() as run:
        yield run


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    """Return a server with every default, shared by the tests of a file."""
    with starting() as run:
        yield run()
