"""A request's work tied to its client: it ends when the client leaves or the server must stop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from sailfish.base.errors import SailfishError
from sailfish.serve.errors import ClientGone

T = TypeVar("T")


class Tether:
    """One request's work, cancelled at once when nobody waits for it any more."""

    def __init__(self) -> None:
        self._work: asyncio.Task[Any] | None = None
        self._error: Exception | None = None

    async def run(
        self,
        work: Coroutine[Any, Any, T],
        receive: Receive,
        *,
        idle_s: float | None = None,
        on_idle: Callable[[], Awaitable[None]] | None = None,
    ) -> T:
        """Return the work's result; raise ClientGone or the interrupting error when it was cut short."""
        self._work = task = asyncio.create_task(work)
        watch = asyncio.create_task(self._watch(receive, idle_s, on_idle))
        try:
            return await task
        except asyncio.CancelledError:
            if self._error is None:
                raise  # this request's own task was cancelled, not the work alone
            raise self._error from None
        finally:
            task.cancel()
            watch.cancel()
            await asyncio.wait((task, watch))

    def interrupt(self, error: SailfishError) -> None:
        """Cut the work short with an error for its client."""
        self._cut(error)

    async def _watch(
        self, receive: Receive, idle_s: float | None, on_idle: Callable[[], Awaitable[None]] | None
    ) -> None:
        while True:
            try:
                message = await asyncio.wait_for(receive(), idle_s)
            except TimeoutError:
                if on_idle is not None:
                    await on_idle()
                continue
            if message["type"] == "http.disconnect":
                self._cut(ClientGone())
                return

    def _cut(self, error: Exception) -> None:
        if self._work is not None and not self._work.done() and self._error is None:
            self._error = error
            self._work.cancel()
